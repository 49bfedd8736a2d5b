"""`ncjax COMMAND`: help and version wait for nothing, and a command is run as its own module
runs it.
"""

import subprocess
import sys

import pytest

import ncjax
from ncjax.cli import choose, measure
from tests.helpers import ROOT


def call(monkeypatch, *words, command=choose):
    """Exit code of `ncjax WORDS`."""
    monkeypatch.setattr(sys, "argv", ["ncjax", *words])
    try:
        return command.main()
    except SystemExit as end:
        return end.code


def test_help_names_every_command_and_version_is_the_packages(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    assert choose.COMMANDS.keys() <= set(capsys.readouterr().out.split())
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.split() == ["ncjax", ncjax.__version__]


@pytest.mark.parametrize("words", [(), ("nothing",), ("--nothing",), ("plots", "run")])
def test_no_command_and_an_unknown_one_are_one_line_and_exit_code_2(words, monkeypatch, capsys):
    assert call(monkeypatch, *words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "COMMAND" in err


@pytest.mark.parametrize(
    ("words", "code"), [(("nowhere.npz",), 2), (("--help",), 0), (("--", "-nowhere.npz"), 2)]
)
def test_a_command_gets_the_words_after_its_name(words, code, monkeypatch, capsys):
    assert call(monkeypatch, "measure", *words) == code
    chosen = capsys.readouterr()
    assert call(monkeypatch, *words, command=measure) == code
    assert capsys.readouterr() == chosen


def test_help_imports_no_command_and_nothing_slow():
    code = """if 1:
        import sys
        from ncjax.cli import choose
        sys.argv = ["ncjax", "--help"]
        try:
            choose.main()
        except SystemExit as end:
            assert end.code == 0
        slow = {f"ncjax.cli.{name}" for name in choose.COMMANDS}
        slow |= {"jax", "numpy", "absl", "xarray", "rich"}
        assert not slow & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)

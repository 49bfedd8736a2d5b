"""paths: a ~ that is nobody's home, in every command that takes a path."""

import numpy as np
import pytest

import ncjax
from ncjax import paths
from ncjax.cli import measure, show, train
from ncjax.errors import InputError

NOBODY = "~nobody-here/x"


@pytest.fixture
def features(tmp_path):
    path = tmp_path / "features.npz"
    np.savez(path, features=np.eye(4, dtype=np.float32), labels=np.array([0, 0, 1, 1]))
    return str(path)


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (lambda _: measure.main([NOBODY]), "features"),
        (lambda features: measure.main([features, "--head", NOBODY]), "--head"),
        (lambda features: measure.main([features, "--labels", NOBODY]), "--labels"),
        (lambda features: measure.main([features, "--figures", NOBODY]), "--figures"),
        (lambda _: show.main([NOBODY]), "workdir"),
        (
            lambda _: train.main(["main", "--config=configs/digits.py", f"--workdir={NOBODY}"]),
            "--workdir",
        ),
    ],
)
def test_a_folder_of_nobody_is_one_line_that_names_the_argument(command, field, features, capsys):
    assert command(features) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {field}: got {NOBODY!r}; ")
    assert error.count("\n") == 1


def test_load_run_names_its_argument():
    with pytest.raises(InputError, match=r"^workdir: got '~nobody-here/x'; "):
        ncjax.load_run(NOBODY)


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache_folder() == tmp_path / "ncjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.cache_folder() == tmp_path / ".cache" / "ncjax"
    monkeypatch.setenv("XDG_CACHE_HOME", NOBODY)
    assert paths.cache_folder() is None

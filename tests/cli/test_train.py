"""The command line: every kind of bad input ends in one line that names the field, exit code 2,
and no WORKDIR.
"""

import pytest

from ncjax.cli import train

BAD = [
    (
        ["--config.sweep.weight_decy=1"],
        "config.sweep.weight_decy",
        "did you mean config.sweep.weight_decay",
    ),
    (["--config.train.epochs=ten"], "config.train.epochs", "'ten'"),
    (["--config.train.epochs=1.5"], "config.train.epochs", "1.5"),
    (["--config.train.epochs=0"], "config.train.epochs", "got 0"),
    (["--config.sweep.weight_decay=-1"], "config.sweep.weight_decay", "-1"),
    (["--config.sweep.weight_decay=nan"], "config.sweep.weight_decay", "nan"),
    (["--config.sweep.weight_decay=1e999"], "config.sweep.weight_decay", "inf"),
    (["--config.sweep.weight_decay=a,b"], "config.sweep.weight_decay", "a"),
    (["--config.sweep.weight_decay=()"], "config.sweep.weight_decay", "one or more"),
    (["--config.sweep.seed=0,1,0"], "config.sweep.seed", "twice"),
    (["--config.sweep.seed=0.5"], "config.sweep.seed", "0.5"),
    (["--config.sweep.momentum=1"], "config.sweep.momentum", "[0, 1)"),
    (["--config.sweep.learning_rate=0"], "config.sweep.learning_rate", "> 0"),
    (["--config.model.widths=0"], "config.model.widths", ">= 1"),
    (["--config.model.activation=tanh"], "config.model.activation", "relu, linear"),
    (["--config.loss=hinge"], "config.loss", "square, cross_entropy"),
    (
        ["--config.train.optimizer=adam", "--config.train.decay=decoupled"],
        "config.train.decay",
        "adamw",
    ),
    (["--config.loss=cross_entropy", "--config.targets=centered"], "config.targets", "one_hot"),
    (["--config.model.linear_head_depth=9"], "config.model.linear_head_depth", "3 hidden layers"),
    (["--config=configs/ufm.py:large"], "'large'", "smoke"),
    (["--config.log.epochs=999"], "config.log.epochs", "300"),
    (["--config.data.input_scale=inf"], "config.data.input_scale", "inf"),
    (["--config.data.per_class=1000"], "config.data.per_class", "145"),
    (["--config.data.per_class=-1"], "config.data.per_class", ">= 0"),
    (["--config.data.num_classes=3"], "config.data.num_classes", "digits"),
    (["--config.data.name=no_such_set"], "config.data.name", "download_and_prepare"),
    (["--config.train.batch_size=5000"], "config.train.batch_size", "1450"),
    (["--config=no/such/file.py"], "--config: got 'no/such/file.py'", "No such file"),
    (["--config=configs/digits.py:large"], "'large'", "smoke"),
    (["--colour=red"], "colour", ""),
    (["--config.mesh.run=x"], "config.mesh.run: got 'x'", "integer >= 0"),
    (["--config.mesh.run", "1e3"], "config.mesh.run: got '1e3'", "integer >= 0"),
    (["-config.mesh.run=x"], "config.mesh.run: got 'x'", "integer >= 0"),
    (["--config.data.standardize=maybe"], "config.data.standardize: got 'maybe'", "True or False"),
    (["--config.mesh=3"], "config.mesh: got '3'", "no such field"),
    (["--config.mesh.run.x=3"], "config.mesh.run.x: got '3'", "config.mesh.run"),
    (["--config.loss"], "--config.loss", "Missing value"),
    (["--noconfig"], "--noconfig", ""),
    (["--processes=x"], "--processes: got 'x'", "int()"),
    (["--dry-run=perhaps"], "--dry-run: got 'perhaps'", ""),
    (["--config=\0"], "--config: got ", "null"),
    (["--config="], "--config: got ''", ""),
    (["--config=./configs"], "--config: got './configs'", "Is a directory"),
    (["--config=mnists"], "--config: got 'mnists'", "did you mean mnist"),
    (["--config=nothing:smoke"], "--config: got 'nothing:smoke'", "digits, fig1_cifar10,"),
    (["--config=mnist:large"], "--config: got 'mnist:large'", "smoke"),
    (["surplus"], "surplus", "--workdir"),
]


@pytest.mark.parametrize(
    ("flags", "field", "hint"), BAD, ids=[" ".join(flags) for flags, _, _ in BAD]
)
def test_bad_input_is_one_line_that_names_the_field(flags, field, hint, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train.main(["ncjax", f"--workdir={workdir}", *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert field in message
    assert hint in message
    assert not workdir.exists()


def test_weights_beyond_the_memory_of_the_machine_are_refused_before_anything_is_compiled(
    tmp_path, capsys
):
    assert (
        train.main(["ncjax", f"--workdir={tmp_path}", "--config.model.widths=1000000,1000000"]) == 2
    )
    message = capsys.readouterr().err
    assert message.startswith("error: config.model.widths: got (1000000, 1000000); ")
    assert message.count("\n") == 1
    assert not (tmp_path / "config.json").exists()


def test_missing_workdir_is_named(capsys):
    assert train.main(["ncjax"]) == 2
    assert "--workdir" in capsys.readouterr().err


def test_workdir_that_is_a_file_or_cannot_be_made_is_named(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for workdir in (file, file / "below"):
        assert train.main(["ncjax", f"--workdir={workdir}"]) == 2
        assert str(workdir) in capsys.readouterr().err


def test_workdir_of_another_config_names_field_and_both_values(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"units": "torch"}')
    assert train.main(["ncjax", f"--workdir={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert "config.units is 'ours' here and 'torch' there" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[1]", "3", "null"])
def test_damaged_config_of_a_workdir_is_named(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert train.main(["ncjax", f"--workdir={tmp_path}"]) == 2
    assert "config.json" in capsys.readouterr().err


_SELF = """from ml_collections import ConfigDict

from ncjax.config import default_config, to_mapping

def get_config():
    config = ConfigDict(to_mapping(default_config()))
    config.itself = config
    return config
"""
# A config file, the line of it that is at fault (None: no line is), and what is said of it.
FAULTS = [
    ("def get_config():\n    return 1 / 0\n", 2, "division by zero"),
    ("\n\ndef get_config(:\n", 3, "invalid syntax"),
    ("x = 1\n\ndef get_config():\n    return y\n", 4, "NameError"),
    ("import no_such_module\n", 1, "no_such_module"),
    ("import json\n\ndef get_config():\n    return json.loads('{')\n", 4, "JSONDecodeError"),
    ("def get_config():\n    raise ValueError('one\\ntwo')\n", 2, "one two"),
    ("def get_config():\n    return open('no/such/file')\n", 2, "no/such/file"),
    ("def get_config():\n    return get_config()\n", 2, "RecursionError"),
    ("import sys\nsys.exit('bye')\n", 2, "bye"),
    ("\xff = 'latin'\n", 1, "utf-8"),
    ("def get_config():\n    raise KeyboardInterrupt\n", 2, "KeyboardInterrupt"),
    (_SELF, None, "recursion"),
    ("x = 1\n", None, "no get_config()"),
    ("get_config = 3\n", None, "not callable"),
    ("def get_config():\n    pass\n", None, "returned NoneType"),
    ("def get_config():\n    return {'train': {}}\n", None, "returned dict"),
    ("\0", None, "null bytes"),
]


@pytest.mark.parametrize(
    ("source", "line", "said"), FAULTS, ids=[source for source, _, _ in FAULTS]
)
def test_an_error_in_the_users_config_names_the_file_and_its_line(
    source, line, said, tmp_path, capsys
):
    config = tmp_path / "mine.py"
    config.write_bytes(source.encode("latin-1"))
    assert train.main(["ncjax", f"--config={config}", f"--workdir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: --config: got '{config}'; ")
    assert ("; line " in message) == (line is not None)
    assert line is None or f"; line {line}: " in message
    assert said in message
    assert message.count("\n") == 1


def test_a_config_without_variants_says_so_of_a_variant(tmp_path, capsys):
    config = tmp_path / "mine.py"
    config.write_text("from ncjax.config import default_config as get_config\n")
    assert train.main(["ncjax", f"--config={config}:smoke", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --config: got '{config}:smoke'; ")


def test_a_config_that_lacks_the_field_of_an_override_is_one_line(tmp_path, capsys):
    config = tmp_path / "mine.py"
    config.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n"
    )
    for override in ("--config.mesh.run=2", "--config.loss=square"):
        assert train.main(["ncjax", f"--config={config}", override, "--dry-run"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_path_that_does_not_exist_is_compared_with_the_configs_that_ship(capsys):
    assert train.main(["ncjax", "--config=elsewhere/mnist.py", "--dry-run"]) == 2
    assert "did you mean mnist" in capsys.readouterr().err


def test_configs_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    by_path = train.load_config("configs/ufm.py:smoke")
    monkeypatch.chdir(tmp_path)
    assert train.load_config("ufm:smoke") == by_path
    assert train.load_config("ufm") != by_path


def test_a_name_means_the_config_that_ships_and_a_path_the_file(tmp_path, monkeypatch):
    source = (
        "from ncjax.config import default_config\n"
        "def get_config():\n    config = default_config()\n    config.train.epochs = 7\n"
        "    return config\n"
    )
    (tmp_path / "digits.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert train.load_config("digits.py").train.epochs == 7
    assert train.load_config("digits").train.epochs == 300


def test_configs_in_the_package_come_before_those_of_a_checkout(tmp_path, monkeypatch):
    (tmp_path / "ncjax" / "configs").mkdir(parents=True)
    (tmp_path / "ncjax" / "configs" / "own.py").write_text("")
    monkeypatch.setattr("ncjax.__file__", str(tmp_path / "ncjax" / "__init__.py"))
    assert list(train.shipped_configs()) == ["own"]


def test_help_lists_every_field(capsys):
    from ncjax.config import SCHEMA

    assert train.main(["ncjax", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--config.{name}=" in text for name in SCHEMA)
    assert "--workdir" in text
    assert ", ".join(train.shipped_configs()) in text
    batch_size, normalization = (
        text.partition(f"--config.{name}=")[2].partition("--config.")[0]
        for name in ("train.batch_size", "model.normalization")
    )
    assert "partial last batch is dropped" in batch_size
    assert "eval mode" in normalization


def test_numbers_that_batch_normalization_makes_ambiguous_name_the_mode():
    from ncjax.metrics.vocabulary import VOCABULARY

    for name in ("fit_loss", "accuracy", "equilibrium_residual"):
        assert "eval mode" in VOCABULARY[name].definition


def test_a_folder_of_other_things_is_no_workdir(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("...")
    assert train.main(["ncjax", f"--workdir={tmp_path}"]) == 2
    assert "thesis.tex and no run" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]

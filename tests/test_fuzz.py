"""Arbitrary configs and command lines: each is accepted, or refused in one line that is no
traceback.
"""

import contextlib
import datetime
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ncjax import config as configuration
from ncjax.cli import train
from ncjax.errors import InputError
from ncjax.plan import prepare
from ncjax.runs import loop
from tests.helpers import ROOT

# Deterministic: CI must not fail by chance. `deadline` is per example; what hangs, or loads too
# much, exceeds it.
COMMON = settings(
    derandomize=True,
    database=None,
    deadline=datetime.timedelta(seconds=5),
    suppress_health_check=[HealthCheck.too_slow],
)

# No integer is between what fits into memory and what no machine could allocate.
integers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31 - 1, 2**31, -(2**63), 2**63, 10**18, 10**30, 10**400, -(10**400)]),
)
floats = st.one_of(
    st.floats(), st.sampled_from([0.0, -0.0, 0.1, 1.0, 1e-320, 1e308, float("nan"), float("inf")])
)
CHOICES = """
digits synthetic identity mnist mnist:3.0.1 ../x mlp relu linear none decayed square cross_entropy
one_hot centered sgd
adam adamw coupled decoupled cosine constant step float32 float64 ours torch
"""
choices = st.sampled_from(CHOICES.split())
texts = st.one_of(
    choices,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["", "a\nb", "a\r\nb", "a\0b", "\u2028", "x" * 5000, "~", "/", ".", "%s{}"]),
)
numpy_values = st.sampled_from(
    [
        np.float32(0.5),
        np.int64(3),
        np.bool_(True),
        np.nan,
        np.arange(3),
        np.eye(3),
        np.array([]),
        np.array("a"),
        1j,
        b"x",
    ]
)
scalars = st.one_of(st.none(), st.booleans(), integers, floats, texts, numpy_values)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers(0, 3)), inner, max_size=2),
    ),
    max_leaves=6,
)


def plausible(field):
    """Values near what a field wants, so that examples get past the first check."""
    default = configuration.SCHEMA[field].default
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, str):
        return texts
    if isinstance(default, tuple):
        return st.lists(
            floats if default and isinstance(default[0], float) else integers, max_size=4
        ).map(tuple)
    return floats if isinstance(default, float) else integers


fields = st.sampled_from(sorted(configuration.SCHEMA))
known = fields.flatmap(
    lambda field: st.tuples(st.just(field), st.one_of(values, plausible(field), plausible(field)))
)
sections = st.tuples(
    st.sampled_from(["data", "model", "train", "sweep", "log", "checkpoint"]), values
)
names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="."), min_size=1, max_size=6
)
unknown = st.tuples(st.one_of(names, names.map("train.{}".format)), values)


def changed(changes):
    nested = configuration.to_mapping(configuration.default_config())
    nested["data"]["name"] = "synthetic"
    for name, value in changes:
        section, _, leaf = name.rpartition(".")
        with contextlib.suppress(TypeError):  # the section has become a number or the like
            (nested[section] if section else nested)[leaf] = value
    return nested


def message_of(error):
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 20_000
    return message


@pytest.mark.slow
@settings(COMMON, max_examples=250)
@given(st.lists(st.one_of(known, known, known, sections, unknown), min_size=1, max_size=3))
@example([("data.dir", "a\0b"), ("data.name", "mnist")])
@example([("data.name", "a\0b")])
@example([("data.name", "mnist\u2028")])
@example([("data.dir", "~nobody-here/x"), ("data.name", "mnist")])
@example([("data.dir", "x" * 5000), ("data.name", "mnist")])
@example([("train.epochs", np.eye(2))])
@example([("sweep.weight_decay", np.eye(3))])
@example([("train", {1: 2})])
@example([("train.epochs", 10**5000)])
def test_every_config_is_valid_or_refused_in_one_line(changes):
    nested = changed(changes)
    with tempfile.TemporaryDirectory() as folder:
        try:
            plan = prepare(configuration.from_mapping(nested), Path(folder) / "run")
        except InputError as error:
            message_of(error)
            assert not (Path(folder) / "run").exists()
            return
        valid = plan.config
        assert configuration.differences(valid, json.loads(configuration.to_json(valid))) == []
        assert configuration.validate(valid) == valid
        assert plan.grid.size == len(plan.grid.columns()["seed"])


@pytest.mark.parametrize("name", ["synthetic", "identity"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("num_classes", 10**13), ("num_classes", 10**30), ("per_class", 10**30)],
    ids=["10**13 classes", "10**30 classes", "10**30 per class"],
)
def test_data_beyond_all_memory_are_refused_by_name(name, field, value, tmp_path):
    config = configuration.default_config()
    config.update({"data.name": name, f"data.{field}": value})
    with pytest.raises(InputError, match=rf"config\.data\.{field}"):
        prepare(config, tmp_path / "run")


@pytest.mark.parametrize("value", [2**31, 10**30, 10**400], ids=["2**31", "10**30", "10**400"])
@pytest.mark.parametrize("field", ["train.epochs", "train.schedule_epochs", "model.widths"])
def test_integers_that_no_device_can_count_to_are_refused(field, value):
    config = configuration.default_config()
    config.update({field: value})
    with pytest.raises(InputError, match=rf"config\.{field}"):
        configuration.validate(config)


@pytest.mark.parametrize(
    "workdir",
    ["x" * 300, "~nobody-here/run", "a\0b", "x/" * 3000],
    ids=["long", "nobody", "null", "deep"],
)
def test_a_workdir_that_cannot_be_is_refused(workdir, tmp_path):
    if not workdir.startswith("~"):
        workdir = str(tmp_path / workdir)
    with pytest.raises(InputError) as refusal:
        prepare(configuration.default_config(), workdir)
    assert "--workdir" in message_of(refusal.value)


# Command lines ------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
literals = st.one_of(
    scalars.map(str),
    st.lists(scalars, max_size=3).map(lambda many: ",".join(map(str, many))),
    values.map(repr),
    words,
    st.sampled_from(
        [
            "(",
            "[",
            "{",
            "((((",
            "1,",
            ",",
            "'",
            '"',
            "1e999",
            "-",
            "0x10",
            "1_0",
            "()",
            "None",
            "lambda: 1",
        ]
    ),
)
flag = st.one_of(
    st.tuples(fields.map("--config.{}".format), literals).map("=".join),
    st.tuples(fields.map("--config.{}".format), literals).map("=".join),
    st.tuples(names.map("--config.{}".format), literals).map("=".join),
    fields.map("--config.{}".format),
    fields.map("--noconfig.{}".format),
    words.map("--{}".format),
    words,
    words.map("--config={}".format),
    st.sampled_from(
        [
            "-",
            "--",
            "---",
            "--config",
            "--config=",
            "--workdir",
            "--config.=1",
            "--config.train=1",
            "=",
            "-c",
        ]
    ),
    st.sampled_from(
        [
            "--flagfile=/nowhere",
            "--undefok=x",
            f"--config={ROOT}/configs",
            "--config=/dev/null",
            f"--config={ROOT}/README.md",
        ]
    ),
)


@settings(COMMON, max_examples=200)
@given(st.lists(flag, max_size=3))
@example(["--config.train.epochs=" + "(" * 500])
@example(["--config.sweep.seed=" + "9" * 5000])
@example(["--config.data.dir=a\nb", "--config.data.name=mnist"])
@example(["--config.data.name=a\nb"])
@example(["--a\nb"])
@example(["a\u2028b"])
@example(["--config=a\nb"])
def test_every_command_line_runs_or_is_refused_in_one_line(arguments):
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_and_show", lambda plan: None)
        patch.chdir(folder)  # for what `--workdir` and a word make
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = train.main(["ncjax", f"--workdir={folder}/run", *arguments])
    assert code in (0, 2)
    if code == 2:
        assert err.getvalue().startswith("error: ")
        assert len(err.getvalue().splitlines()) == 1
    else:
        assert not err.getvalue()

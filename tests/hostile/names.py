"""Names of files and folders: markup, mathtext, globs, URLs, options, control characters, bytes
that are no UTF-8.
"""

import functools
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests import chaos
from tests.hostile import engine
from tests.hostile.engine import Failure, Ran

NAMES = (
    *("[bold]x[/bold]", "[/]", "d[/y]", "[red", "[link=file:x]y", "[0-9]", "a[b]c"),
    *("a$\\frac$", "$x^2", "a$b$c", "\\$", "x_1^2", "$", "_x", "__"),
    *("100%", "%s", "%20", "a#b", "a?b", "a?b=c#d", "a\\b"),
    *("\\", "a*b", "**", "{x}", "{0}", "a{b,c}d", "${HOME}",),
    *("-x", "--json", "--", "a b", " a", "a ", "~", "~nobody", "a'b", 'a"b', "a;b", "a|b", "a&b"),
    *("a:b", "a=b",),
    *("a,b", "@x", "`x`"),
    *("a\nb", "\n", "a\tb", "a\rb", "\x1b[31mred", "\x01", "\x7f"),
    *("\u00e9", "e\u0301", "日本語", "😀", "\u202egpj", "\u200b", "\u2028", "ß" * 60, "\ufeffx"),
    *("\udcff", "a\udce9b", "x" * 240, ".hidden", "file:x", "http:x", "gs:x", "ocdbt", "CON", "0"),
    *("1e3", "None",),
)  # fmt: skip
# What only a long run can show is tried on these.
_FEW = (
    "[bold]x[/bold]",
    "d[/y]",
    "a$\\frac$",
    "$x^2",
    "a#b?c%d",
    "a\nb",
    "日本語",
    "😀",
    "\udcff",
    "--json",
    "x" * 240,
    "_x",
)
_FEATURES = engine.ROOT / "tests/data/features.npz"
_HEAD = engine.ROOT / "tests/data/head.npz"


def _is_plain(name: str) -> bool:
    return name.isascii() and name.isprintable() and " " not in name


@functools.cache
def _numbers() -> dict:
    return json.loads(engine.run_here("measure", _FEATURES, "--head", _HEAD, "--json").out)[
        "metrics"
    ]


def _same_numbers(name: str, ran: Ran) -> None:
    found = json.loads(ran.out)
    if found["metrics"] != _numbers():
        raise Failure("silent", f"other numbers: {ran}")
    if Path(found["features"]).name != f"{name}.npz":
        raise Failure("silent", f"it names {found['features']!a}")


def _names_it(name: str, ran: Ran) -> None:
    """A table must show the name as it is; a long one is folded."""
    if _is_plain(name) and name not in "".join(ran.out.split()).replace("│", "").replace("┃", ""):
        raise Failure("silent", f"{name!r} is not what it says: {ran}")


def _feature_file(name: str, draw: bool, folder: Path) -> None:
    features, head = folder / f"{name}.npz", folder / f"{name}.head.npz"
    try:
        shutil.copy(_FEATURES, features)
        shutil.copy(_HEAD, head)
    except OSError as error:
        raise engine.Skipped(f"no such name here: {error.strerror}") from error
    given = (features, "--head", head)
    engine.check(
        engine.run_here("measure", *given, "--json"), functools.partial(_same_numbers, name)
    )
    engine.check(engine.run_here("measure", *given), functools.partial(_names_it, name))
    if draw:
        shutil.copy(_FEATURES, folder / "second.npz")
        layers = (folder / "second.npz", *given, "--figures", folder / name)
        engine.check(
            engine.run_here("measure", *layers), lambda ran: _has_files(folder / name, ran)
        )


def _has_files(folder: Path, ran: Ran) -> None:
    if not list(folder.glob("*.png")):
        raise Failure("silent", f"nothing was written: {ran}")


def _workdir(name: str, parent: bool, folder: Path) -> None:
    """Trains in it, in two parts, reads it and measures it again; or is refused before there is
    anything in it.
    """
    workdir = folder / name / "run" if parent else folder / name
    flags = (*chaos.SMALL, f"--workdir={workdir}")
    ran = engine.run_here("train", *flags)
    if ran.code == 2:
        engine.check(ran)
        if workdir.exists() and any(workdir.iterdir()):
            raise Failure("other", f"refused only after it had begun: {ran}")
        return
    engine.check(
        ran, functools.partial(engine.check_same, workdir, engine.reference()), refuses=False
    )
    _names_it(name, ran)
    # A checkpoint that cannot be read back would be found now.
    engine.check(engine.run_here("train", *flags), refuses=False)
    shutil.rmtree(workdir)
    shutil.copytree(engine.unfinished(), workdir)
    again = engine.run_here("train", *flags)
    engine.check(
        again, functools.partial(engine.check_same, workdir, engine.reference()), refuses=False
    )
    one = ("--run", "weight_decay=1e-2,seed=1")
    engine.check(
        engine.run_here("show", workdir, *one), functools.partial(_names_it, name), refuses=False
    )
    engine.check(
        engine.run_here("show", workdir, *one, "--json"),
        lambda ran: _names_workdir(workdir, ran),
        refuses=False,
    )
    weights = folder / "weights.npz"
    engine.check(engine.run_here("show", workdir, *one, "--export", weights), refuses=False)
    with np.load(weights) as exported:
        if not all(
            np.isfinite(exported[key]).all()
            for key in exported.files
            if exported[key].dtype.kind == "f"
        ):
            raise Failure("silent", "weights that are not finite were exported")


def _names_workdir(workdir: Path, ran: Ran) -> None:
    if json.loads(ran.out)["workdir"] != str(workdir):
        raise Failure("silent", f"it names {json.loads(ran.out)['workdir']!a}")


def _compared(name: str, folder: Path) -> None:
    """Names of WORKDIRs stand in figures."""
    shutil.copytree(engine.trained(), folder / name / "a")
    shutil.copytree(engine.trained(), folder / name / name)
    ran = engine.run_here(
        "plot", folder / name / "a", folder / name / name, "--out", folder / f"out {name}"
    )
    engine.check(ran, lambda ran: _has_files(folder / f"out {name}", ran), refuses=False)


_CONFIG = """
from ncjax.config import default_config
def get_config():
    config = default_config()
    config.data.name, config.data.num_classes, config.train.epochs = "synthetic", 3, 1
    config.model.widths, config.train.batch_size = (8, 8), 16
    return config
"""


def _config(name: str, folder: Path) -> None:
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)  # of a name with a slash
    path.write_text(_CONFIG)
    ran = engine.run_here("train", f"--config={path}", f"--workdir={folder / 'run'}")
    engine.check(ran)
    if ran.code == 0 and not (folder / "run" / "history.nc").exists():
        raise Failure("silent", f"no history: {ran}")


def _export(name: str, folder: Path) -> None:
    for suffix in (".npz", ".safetensors"):
        path = folder / f"{name}{suffix}"
        ran = engine.run_here(
            "show", engine.trained(), "--run", "weight_decay=0,seed=0", "--export", path
        )
        engine.check(ran, functools.partial(_names_it, name))
        if ran.code == 0 and not path.exists():
            raise Failure("silent", f"nothing was written: {ran}")


def _relative(argument: str, folder: Path) -> None:
    """Names that look like options, where the shell gives no folder before them."""
    shutil.copy(_FEATURES, folder / f"{argument}.npz")
    engine.check(
        engine.run("ncjax", "measure", f"{argument}.npz", "--json", cwd=folder),
        lambda ran: json.loads(ran.out),
    )
    engine.check(
        engine.run("ncjax", "measure", "--json", "--", f"{argument}.npz", cwd=folder),
        functools.partial(_same_but_head, argument),
        refuses=False,
    )


def _same_but_head(name: str, ran: Ran) -> None:
    found = json.loads(ran.out)
    if found["features"] != f"{name}.npz" or not math.isclose(
        found["metrics"]["nc1"], _numbers()["nc1"], rel_tol=1e-5
    ):
        raise Failure("silent", f"other numbers: {ran}")


def cases(_: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for name in NAMES:
        yield f"feature file {name!a}", functools.partial(_feature_file, name, name in _FEW)
        yield f"WORKDIR {name!a}", functools.partial(_workdir, name, False)
    for name in _FEW:
        yield f"parent of WORKDIR {name!a}", functools.partial(_workdir, name, True)
        yield f"config file {name!a}", functools.partial(_config, name)
        yield f"exported file {name!a}", functools.partial(_export, name)
    for name in ("[bold]x[/bold]", "a$\\frac$", "_x", "日本語"):
        yield f"compared WORKDIR {name!a}", functools.partial(_compared, name)
    for name in ("-x", "--json", "@x"):
        yield f"relative feature file {name!a}", functools.partial(_relative, name)

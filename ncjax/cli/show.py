"""Says what is in a WORKDIR: what ran, with which parameters, whether the files are sound, and what
was measured.

    ncjax show runs/digits
    ncjax show runs/digits --run weight_decay=1e-3,seed=0 --verify
    ncjax show runs/digits --run weight_decay=1e-3,seed=0 --export digits.safetensors
    ncjax show runs/optimizers --run optimizer=sgd

Nothing is changed in it. Exit codes: 0; 1: --verify found something that does not hold; 2: bad
input.
"""

import argparse
import functools
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncjax import environment
from ncjax.cli import command
from ncjax.config import AXES
from ncjax.errors import InputError, listed, printable
from ncjax.paths import check_name, expanded

if TYPE_CHECKING:
    import xarray as xr

    from ncjax.runs.inspect import WorkdirContents
    from ncjax.runs.variants import Variants

EXPORTS = (".safetensors", ".npz")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    arguments = _parse(argv)
    try:
        coordinates = parse_coordinates(arguments.run)
        if arguments.export and arguments.export.suffix not in EXPORTS:
            raise InputError(
                "--export", str(arguments.export), f"its name must end in {' or '.join(EXPORTS)}"
            )
        return _show(arguments, coordinates)
    except (InputError, OSError) as error:
        return command.refuse(error)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog="ncjax show",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", metavar="WORKDIR", type=Path, help="folder of a run")
    parser.add_argument(
        "--epoch", type=int, help="measured epoch, or epoch of a checkpoint (default: the newest)"
    )
    parser.add_argument(
        "--run",
        metavar="NAME=VALUE,...",
        default="",
        help="one run of the grid, read and checked alone; or, as in optimizer=sgd, one variant",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="measure the checkpoint again; compare with history.nc",
    )
    parser.add_argument(
        "--data",
        metavar="NAME",
        default="",
        help="data of --verify, where they lie elsewhere than config.data.name says: a .npz, a "
        "folder, a TFDS name",
    )
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    parser.add_argument(
        "--export",
        metavar="FILE",
        type=Path,
        help="one run's weights: FILE.safetensors or FILE.npz",
    )
    return parser.parse_args(argv)


def parse_coordinates(text: str) -> dict[str, float | str]:
    """`optimizer=sgd,seed=0` -> {"optimizer": "sgd", "seed": 0.0}, or InputError."""
    coordinates: dict[str, float | str] = {}
    for part in filter(None, text.split(",")):
        name, _, value = (word.strip() for word in part.partition("="))
        coordinate = _as_coordinate(value)
        if not value or name in coordinates or (name in AXES and isinstance(coordinate, str)):
            raise InputError(
                "--run", text, "write NAME=VALUE,..., as in --run weight_decay=1e-3,seed=0"
            )
        coordinates[name] = coordinate
    return coordinates


def _as_coordinate(text: str) -> float | str:
    """Returns the number that a text is, or the text."""
    try:
        return float(text)
    except ValueError:
        return text


def _show(arguments: argparse.Namespace, coordinates: dict[str, float | str]) -> int:
    followed = _read_monitored(expanded("workdir", arguments.workdir))
    if followed is not None:
        return _show_monitored(arguments, followed)
    environment.import_jax()
    from ncjax.runs import load, variants
    from ncjax.training import parallel

    check_name("WORKDIR", arguments.workdir)
    if arguments.verify:
        parallel.find_devices()
    held = variants.find(expanded("workdir", arguments.workdir))
    if held is not None and not coordinates and not arguments.export:
        show = functools.partial(_show_variants, arguments, held)
    else:
        if held is not None:
            _, arguments.workdir, coordinates = held.find(coordinates)
        show = functools.partial(_show_once, arguments, coordinates)
    for _ in range(load.ATTEMPTS - 1):
        try:
            return show()
        except load.Removed:
            if arguments.epoch is not None:
                raise
    return show()


def _show_variants(arguments: argparse.Namespace, held: "Variants") -> int:
    """Prints what every variant of a WORKDIR holds, and the table of all."""
    from ncjax.runs import inspect, variants
    from ncjax.storage import journal

    shown, problem = [], variants.joined_problem(held)
    for labels, folder in held.folders:
        if not any((folder / name).exists() for name in ("config.json", "checkpoints")):
            shown.append({"variant": labels, "workdir": str(folder), "state": "not begun yet"})
            continue
        holdings = inspect.read(folder, {})
        measured, saved = _epochs(holdings, arguments.epoch)
        found = {"variant": labels, **_describe(holdings, measured, saved)}
        if arguments.verify:
            found["verification"] = _verify(holdings, arguments.epoch, arguments.data)
        shown.append(found)
    whole = {
        "workdir": str(held.workdir),
        "vary": {f"config.{name}": values for name, values in held.variation.values.items()},
        "history": {"sound": problem is None, "problem": problem},
        "variants": shown,
    }
    if arguments.json:
        print(json.dumps(journal.strict(whole)))
    else:
        _print_variants(whole, held, arguments.epoch)
    verified = [one.get("verification", {"passed": False})["passed"] for one in shown]
    return 1 if arguments.verify and (problem is not None or not all(verified)) else 0


def _print_variants(whole: dict[str, Any], held: "Variants", epoch: int | None) -> None:
    from rich.table import Table

    from ncjax.report import tables
    from ncjax.storage import history
    from ncjax.variation import shown

    console = tables.make_console()
    tables.say(console, f"{'WORKDIR':<12}{whole['workdir']}")
    for (name, labels), field in zip(held.variation.labels.items(), whole["vary"], strict=True):
        tables.say(console, f"{'varied':<12}{field}: {name} = {shown(labels)}")
    problem = whole["history"]["problem"]
    tables.say(console, f"{'history.nc':<12}{problem or 'it is that of all variants'}")
    table = Table("variant", "runs", "epochs", "checkpoints", "history.nc")
    for (_, folder), one in zip(held.folders, whole["variants"], strict=True):
        if "state" in one:
            table.add_row(printable(folder.name), "", one["state"], "", "")
            continue
        epochs = f"{one['epochs']['done']} of {one['epochs']['asked']}"
        saved = [f"{c['epoch']}: {c['problem'] or 'sums hold'}" for c in one["checkpoints"]]
        state = one["history"]["problem"] or ("sound" if one["history"]["sound"] else "not there")
        cells = (folder.name, str(one["runs"]), epochs, "; ".join(saved), state)
        table.add_row(*map(printable, cells))
    console.print(table)
    if problem is None:
        recorded = history.load(held.workdir / "history.nc")
        measured = recorded["epoch"].values.tolist()
        if epoch is None or epoch in measured:
            last = measured[-1] if epoch is None else epoch
            tables.show_collapse(history.up_to(recorded, last), console)
    for (_, folder), one in zip(held.folders, whole["variants"], strict=True):
        for note in one.get("notes", ()):
            tables.say(console, f"note: {folder.name}: {note}")
        if "verification" in one:
            tables.say(console, f"{folder.name}: {_verdict(one['verification'])}")


def _read_monitored(workdir: Path) -> "xr.Dataset | None":
    """Returns the history of a model that `ncjax.Monitor` follows; None of any other WORKDIR."""
    from ncjax.storage import history, monitored

    try:
        found = history.read(workdir / "history.nc")
    except (ValueError, OSError):  # as will be said of it
        return None
    return found if monitored.is_monitored(found) else None


def _show_monitored(arguments: argparse.Namespace, history: "xr.Dataset") -> int:
    """Prints the measurements of every layer at one epoch."""
    from ncjax.report import tables
    from ncjax.storage import journal

    for flag in ("run", "verify", "export"):
        if getattr(arguments, flag):
            way_out = f"it is of ncjax.Monitor and holds no runs; leave --{flag} out"
            raise InputError("WORKDIR", str(arguments.workdir), way_out)
    measured = history["epoch"].values.tolist()
    epoch = measured[-1] if arguments.epoch is None else arguments.epoch
    if epoch not in measured:
        raise InputError("--epoch", epoch, f"measured were {listed(measured)}")
    one = history.sel(epoch=epoch)
    names = [str(name) for name in one.data_vars if name != "seconds"]
    if arguments.json:
        found = {
            "workdir": str(arguments.workdir),
            "epochs": {"measured": measured},
            "epoch": epoch,
            "seconds": float(one["seconds"]),
            "layers": {
                str(layer): {name: float(one[name].sel(layer=layer)) for name in names}
                for layer in one["layer"].values
            },
            "notes": history.attrs["remarks"].splitlines(),
        }
        print(json.dumps(journal.strict(found)))
        return 0
    console = tables.make_console()
    tables.say(console, f"{'WORKDIR':<12}{arguments.workdir}")
    tables.say(console, f"{'epochs':<12}measured at {listed(measured)}")
    took = f"{float(one['seconds']):.2f} s, {float(history['seconds'].sum()):.1f} s in all"
    tables.say(console, f"{'measured in':<12}{took}")
    tables.show_layers(one, names, f"Epoch {epoch}, layers in forward order", console)
    for line in history.attrs["remarks"].splitlines() if epoch == measured[-1] else ():
        tables.say(console, f"note: {line}")
    return 0


def _show_once(arguments: argparse.Namespace, coordinates: dict[str, float | str]) -> int:
    from ncjax.runs import inspect, load
    from ncjax.storage import journal

    holdings = inspect.read(expanded("workdir", arguments.workdir), coordinates)
    measured, saved = _epochs(holdings, arguments.epoch)
    found = _describe(holdings, measured, saved)
    if arguments.export:
        if holdings.place is None:
            several = [
                f"{name} = {listed(values)}"
                for name, values in holdings.axes.items()
                if len(values) > 1
            ]
            raise InputError(
                "--run",
                arguments.run,
                f"--export takes one run: give it one of each {'; '.join(several)}",
            )
        if saved is None:
            raise InputError(
                "--export", str(arguments.export), _no_checkpoint(holdings, arguments.epoch)
            )
        with warnings.catch_warnings(action="ignore"):  # a note says what they say
            run = load.load_run(
                holdings.workdir, epoch=saved, dataset=None, **holdings.place.coordinates
            )
        inspect.export(run, arguments.export)
        found["export"] = str(arguments.export)
    if arguments.verify:
        found["verification"] = _verify(holdings, arguments.epoch, arguments.data)
    if arguments.json:
        print(json.dumps(journal.strict(found)))
    else:
        _print(found, holdings, measured)
    return 1 if arguments.verify and not found["verification"]["passed"] else 0


def _epochs(holdings: "WorkdirContents", epoch: int | None) -> tuple[int | None, int | None]:
    """Returns (measured epoch, epoch of a checkpoint) as asked for, or the newest (sound) ones;
    None: there is none.
    """
    sound = [saved.epoch for saved in holdings.checkpoints if saved.problem is None]
    if epoch is None:
        return (holdings.measured or [None])[-1], (sound or [None])[-1]
    saved = [saved.epoch for saved in holdings.checkpoints]
    if epoch not in {*holdings.measured, *saved}:
        way_out = (
            f"measured were {listed(holdings.measured)}; there are checkpoints of {listed(saved)}"
        )
        raise InputError("--epoch", epoch, way_out)
    return epoch if epoch in holdings.measured else None, epoch if epoch in saved else None


def _no_checkpoint(holdings: "WorkdirContents", epoch: int | None) -> str:
    if epoch is None:
        return "there is no sound checkpoint"
    return (
        f"there is no checkpoint of epoch {epoch}; there are "
        f"{listed([s.epoch for s in holdings.checkpoints])}"
    )


def _verify(holdings: "WorkdirContents", epoch: int | None, data: str) -> dict[str, Any]:
    """Returns what `inspect.verify` finds, and all that was found damaged before it."""
    from ncjax.runs import inspect

    saved = [s.epoch for s in holdings.checkpoints]
    if not saved or (epoch is not None and epoch not in saved):
        raise InputError("--verify", str(holdings.workdir), _no_checkpoint(holdings, epoch))
    if epoch is not None and holdings.history is not None and epoch not in holdings.measured:
        raise InputError(
            "--epoch", epoch, f"it was not measured; measured were {listed(holdings.measured)}"
        )
    problems = [f"checkpoint {s.epoch}: {s.problem}" for s in holdings.checkpoints if s.problem]
    if holdings.history is None:
        problems.append(holdings.history_problem or "there is no history.nc")
    sound = [
        s.epoch for s in holdings.checkpoints if s.problem is None and s.epoch in holdings.measured
    ]
    chosen = max((e for e in sound if epoch in (None, e)), default=None)
    if chosen is None:
        problems.append("no sound checkpoint is of a measured epoch")
        return {"passed": False, "problems": problems}
    result = inspect.verify(holdings, chosen, data)
    if not result.passed:
        problems.append(f"{result.variable} deviates by {result.deviation:.2g}")
    return {"passed": not problems, "problems": problems, **result._asdict()}


def _describe(
    holdings: "WorkdirContents", measured: int | None, saved: int | None
) -> dict[str, Any]:
    """Returns what --json prints: everything but the layout of the tables."""
    shown = next(
        (s for s in reversed(holdings.checkpoints) if s.parameters and saved in (None, s.epoch)),
        None,
    )
    parameters = [
        {"name": p.name, "shape": list(p.shape), "dtype": p.dtype, "size": p.size, "bytes": p.bytes}
        for p in (shown.parameters if shown else ())
    ]
    return {
        "workdir": str(holdings.workdir),
        "config": holdings.config,
        "grid": holdings.axes,
        "runs": math.prod(len(values) for values in holdings.axes.values()),
        "run": holdings.place and {"index": holdings.place.index, **holdings.place.coordinates},
        "epochs": {
            "asked": holdings.config["train"]["epochs"],
            "done": max([0, *holdings.measured, *(s.epoch for s in holdings.checkpoints)]),
            "measured": holdings.measured,
        },
        **holdings.provenance,
        "parameters": parameters,
        "parameter_count": sum(p["size"] for p in parameters),
        "checkpoints": [
            {"epoch": s.epoch, "bytes": s.bytes, "sound": s.problem is None, "problem": s.problem}
            for s in holdings.checkpoints
        ],
        "history": {
            "sound": holdings.history is not None,
            "sealed": holdings.history_is_sealed,
            "problem": holdings.history_problem,
        },
        "measurements": _measurements(holdings, measured),
        "notes": holdings.notes,
    }


def _measurements(holdings: "WorkdirContents", epoch: int | None) -> dict[str, Any] | None:
    """Every variable at one epoch, with the dimensions of its nested lists, and the coordinates
    of those.
    """
    if epoch is None or holdings.history is None:
        return None
    variables = {}
    for name, variable in holdings.history.data_vars.items():
        if "epoch" not in variable.dims and epoch != holdings.measured[-1]:
            continue  # kept of the newest epoch alone
        one = variable.sel(epoch=epoch) if "epoch" in variable.dims else variable
        variables[str(name)] = {"dims": list(one.dims), "values": one.values.tolist()}
    coordinates = {
        str(name): values.values.tolist() for name, values in holdings.history.coords.items()
    }
    return {"epoch": epoch, "coordinates": coordinates | {"epoch": epoch}, "variables": variables}


def _print(found: dict[str, Any], holdings: "WorkdirContents", measured: int | None) -> None:
    from rich.table import Table

    from ncjax.report import tables
    from ncjax.storage import history

    console = tables.make_console()
    for name, line in _summary(found).items():
        tables.say(console, f"{name:<12}{line}")
    table = Table(
        "checkpoint", "size", "checksums" if found["run"] is None else "checksums of this run"
    )
    for saved in found["checkpoints"]:
        table.add_row(
            f"{saved['epoch']}", _bytes(saved["bytes"]), printable(saved["problem"] or "hold")
        )
    if found["checkpoints"]:
        console.print(table)
    if found["parameters"]:
        table = Table("parameters of one run", "shape", "type", "numbers", "bytes")
        for p in found["parameters"]:
            shape = " x ".join(map(str, p["shape"]))
            table.add_row(p["name"], shape, p["dtype"], f"{p['size']:,}", _bytes(p["bytes"]))
        total = sum(p["bytes"] for p in found["parameters"])
        table.add_section()
        table.add_row("total", "", "", f"{found['parameter_count']:,}", _bytes(total))
        console.print(table)
    if measured is not None and holdings.history is not None:
        tables.show_collapse(history.up_to(holdings.history, measured), console)
    for note in found["notes"]:
        tables.say(console, f"note: {note}")
    if "export" in found:
        tables.say(console, f"wrote {found['export']}")
    if "verification" in found:
        tables.say(console, _verdict(found["verification"]))


def _summary(found: dict[str, Any]) -> dict[str, str]:
    from ncjax.report import thinning

    config, epochs, run = found["config"], found["epochs"], found["run"]
    sections = {name: _pairs(config[name]) for name in ("data", "model", "train")}
    sections["train"] += "".join(
        f", {name}={config[name]}" for name in ("loss", "targets", "units") if name in config
    )
    swept = "; ".join(
        f"{name} = {thinning.abridged([f'{value:.10g}' for value in values])}"
        for name, values in found["grid"].items()
    )
    one = ", ".join(
        f"{name}={value:.10g}" for name, value in (run or {}).items() if name != "index"
    )
    of_epochs = f"{epochs['done']} of {epochs['asked']}, measured at {listed(epochs['measured'])}"
    software = (
        ", ".join(f"{name} {version}" for name, version in found["versions"].items()) or "unknown"
    )
    history = found["history"]
    state = "its checksum holds" if history["sealed"] else "no checksum lies beside it"
    seen = {
        "WORKDIR": found["workdir"],
        **sections,
        "grid": f"{found['runs']} runs: {swept}",
        "run": f"{one} (index {run['index']} in the grid, from 0)" if run else "",
        "epochs": of_epochs + ("" if found["checkpoints"] else "; no checkpoint yet"),
        "software": software,
        "device": f"{found['device'] or 'unknown'}; git revision "
        f"{found['git_revision'] or 'unknown'}",
        "arrays": ", ".join(f"{part} {crc:08x}" for part, crc in found["data_checksums"].items()),
        "history.nc": history["problem"] or (state if history["sound"] else "not there yet"),
    }
    return {name: line for name, line in seen.items() if line}


def _pairs(section: dict[str, Any]) -> str:
    """Returns a section of the config in one line; what is left empty is left out."""
    shown = {
        name: ",".join(map(str, v)) if isinstance(v, list) else v for name, v in section.items()
    }
    return ", ".join(f"{name}={value}" for name, value in shown.items() if value != "")


def _bytes(count: float | int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _verdict(verification: dict[str, Any]) -> str:
    line = "verified: "
    if "epoch" in verification:
        where = ", ".join(
            f"{name}={value:.10g}" for name, value in verification["coordinates"].items()
        )
        runs = f"{verification['runs']} run{'s' if verification['runs'] > 1 else ''}"
        line += (
            f"{verification['variables']} variables of {runs} at epoch {verification['epoch']}, "
            "measured again: the "
            f"largest relative deviation is {verification['deviation']:.2g} "
            f"({verification['variable']} at {where}), "
            f"of {verification['tolerance']:g} allowed; "
        )
    return line + (
        "PASS" if verification["passed"] else f"FAIL: {'; '.join(verification['problems'])}"
    )

"""Neural collapse of any model's features: class means, NC1 to NC4, and with weight decay its
head's equilibrium.

    ncjax measure feats.npz --head head.npz
    ncjax measure layer1.npy layer2.npy layer3.npy --labels labels.npy --figures figures
    ncjax measure feats.safetensors --head head.safetensors --weight-decay 5e-4 \\
        --loss cross_entropy --json

FEATURES is .npz or .safetensors with `features` (N, p), `labels` (N,) from 0 to C - 1 and, where
outputs should not be computed from the head, `logits` (N, C); or .npy with features alone. Files
are memory-mapped (a compressed .npz is not). --head has `head_kernel` (C, p), as in PyTorch's
Linear.weight, and `head_bias` (C,). Several files are layers, in forward order, of which the last
feeds the head; the others' labels may be left out.

In Python: `ncjax.measure(features, labels, head=W, bias=b)`; docs/measure.md. Exit codes:
0; 2: bad input.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncjax import environment
from ncjax.cli import command
from ncjax.errors import InputError, printable
from ncjax.features.measure import measure_batches
from ncjax.paths import expanded, make_folder

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from ncjax.features.result import Measurement


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    arguments = _parse(argv)
    try:
        return _measure_files(arguments)
    except (InputError, OSError) as error:
        return command.refuse(error)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog="ncjax measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "features",
        metavar="FEATURES",
        type=Path,
        nargs="+",
        help=".npz, .npy or .safetensors; several: layers",
    )
    add(
        "--head",
        metavar="FILE",
        type=Path,
        help="head_kernel (C, p) and head_bias (C,); .npy: the kernel alone",
    )
    add(
        "--labels",
        metavar="FILE",
        type=Path,
        help="labels (N,), where the files of features have none",
    )
    add(
        "--classes",
        metavar="C",
        type=int,
        help="how many (default: the head's, else one more than the largest label)",
    )
    add(
        "--loss",
        choices=("square", "cross_entropy"),
        default="square",
        help="what residuals y - f are of",
    )
    add(
        "--weight-decay",
        metavar="LAMBDA",
        type=float,
        help="of the head's training: equilibrium and budget",
    )
    words = (
        "mu_G, where classes are not of one size: the mean of their means (default) or of all "
        "examples"
    )
    add("--global-mean", choices=("classes", "examples"), default="classes", help=words)
    add(
        "--float64",
        action="store_true",
        help="compute in float64 (default: where float32 is too narrow for their type)",
    )
    add(
        "--batch",
        metavar="ROWS",
        type=int,
        help="examples at once (default: 16 to 64 MiB of features)",
    )
    add(
        "--figures",
        metavar="DIR",
        type=Path,
        help="writes spectra, angles and a scatter of classes, or of layers",
    )
    add(
        "--json",
        action="store_true",
        help="one JSON object; its `metrics` are flat, null where undefined",
    )
    return parser.parse_args(argv)


def _measure_files(arguments: argparse.Namespace) -> int:
    # No JAX yet: what is wrong with a file is said at once.
    for name, value in (("--batch", arguments.batch), ("--classes", arguments.classes)):
        if value is not None and value < 1:
            raise InputError(name, value, "give a number from 1 on")
    head = {} if arguments.head is None else _read("--head", arguments.head, "head_kernel")
    if arguments.head is not None and "head_kernel" not in head:
        raise InputError(
            "--head", str(arguments.head), f"it has no head_kernel, but {_names(head)}"
        )
    files = [_read("features", path, "features") for path in arguments.features]
    held = {} if arguments.labels is None else _read("--labels", arguments.labels, "labels")
    if arguments.labels is not None and "labels" not in held:
        raise InputError("--labels", str(arguments.labels), f"it has no labels, but {_names(held)}")
    labels = held.get("labels")
    shared = (
        labels if labels is not None else next((f["labels"] for f in files if "labels" in f), None)
    )
    batches = []
    for path, arrays in zip(arguments.features, files, strict=True):
        if "features" not in arrays:
            raise InputError(str(path), _names(arrays), "an array must be named features")
        own = shared if labels is not None else arrays.get("labels", shared)
        if own is None:
            raise InputError(
                str(path), _names(arrays), "no array is named labels; add it, or give --labels FILE"
            )
        shape = arrays["features"].shape
        if len(shape) != 2:
            raise InputError(
                str(path), f"features of shape {shape}", "give (N, p), a row per example"
            )
        logits = () if "logits" not in arrays else (arrays["logits"],)
        batches.append((arrays["features"], own, *logits))
        if len(arrays["features"]) != len(batches[0][0]):
            way_out = (
                f"layers are of the same examples, of which {arguments.features[0]} has "
                f"{len(batches[0][0])}"
            )
            raise InputError(str(path), f"{len(arrays['features'])} examples", way_out)
    if arguments.figures is not None:
        make_folder("--figures", expanded("--figures", arguments.figures))
    environment.import_jax()
    from ncjax.features import measurement, streaming  # noqa: F401 (before the progress bar hides the cursor)
    from ncjax.training import mesh

    mesh.use_every_core()
    from ncjax.features.streaming import check_num_classes

    if arguments.classes is not None:
        check_num_classes("--classes", arguments.classes, max(own.shape[1] for own, *_ in batches))
    found = []
    with _progress(2 * sum(len(own) for _, own, *_ in batches if own.ndim)) as advance:
        for i, batch in enumerate(batches):
            last = (
                {"head": head.get("head_kernel"), "bias": head.get("head_bias")}
                if i == len(batches) - 1
                else {}
            )
            decay = arguments.weight_decay if last else None
            measured = measure_batches(
                [batch],
                num_classes=arguments.classes or (len(head["head_kernel"]) if head else None),
                **{
                    "loss": arguments.loss,
                    "weight_decay": decay,
                    "global_mean": arguments.global_mean,
                },
                **{
                    "float64": arguments.float64 or None,
                    "rows": arguments.batch,
                    "progress": advance,
                    **last,
                },
            )
            found.append(measured)
    return _report(arguments, found)


# Axes of the arrays that files hold, by name.
_AXES = {
    "features": ("N", "p"),
    "labels": ("N",),
    "logits": ("N", "C"),
    "head_kernel": ("C", "p"),
    "head_bias": ("C",),
}


def _read(field: str, path: Path, sole: str) -> dict[str, "np.ndarray"]:
    """Reads the arrays of a file by name, those of a known name with the axes that go with it;
    or InputError.
    """
    from ncjax.features import files as features

    arrays = features.read(expanded(field, path), sole)
    for name in [name for name in _AXES if name in arrays]:
        axes, shape = _AXES[name], arrays[name].shape
        if len(shape) != len(axes) or any(
            size == 0 and axis != "N" for size, axis in zip(shape, axes, strict=True)
        ):
            raise InputError(str(path), f"{name} of shape {shape}", f"give {' x '.join(axes)}")
    return arrays


def _names(arrays: dict[str, Any]) -> str:
    return ", ".join(arrays) or "no array"


def _progress(total: int) -> Any:
    """Returns a context that gives a function to call with the number of examples done."""
    import contextlib

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("measuring"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )

    @contextlib.contextmanager
    def bar() -> Any:
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            task = progress.add_task("", total=total)
            yield lambda rows: progress.advance(task, rows)

    return bar()


def _report(arguments: argparse.Namespace, found: list["Measurement"]) -> int:
    from ncjax.report import tables
    from ncjax.storage import journal

    layers = [str(path) for path in arguments.features]
    if arguments.json:
        described = [
            _describe(arguments, layer, one) for layer, one in zip(layers, found, strict=True)
        ]
        print(
            json.dumps(
                journal.strict(described[0] if len(described) == 1 else {"layers": described})
            )
        )
    else:
        _print(layers, found, arguments.global_mean, tables.make_console())
    if arguments.figures is not None:
        from ncjax.report import feature_figures

        console = tables.make_console(stderr=arguments.json)
        names = dict.fromkeys(path.stem for path in arguments.features)
        shown = names if len(names) == len(layers) else layers
        folder = expanded("--figures", arguments.figures)
        for path in feature_figures.write(dict(zip(shown, found, strict=True)), folder):
            tables.say(console, f"figure: {path}")
    return 0


def _describe(arguments: argparse.Namespace, layer: str, found: "Measurement") -> dict[str, Any]:
    present = found.examples[found.examples > 0]
    facts = {
        "features": layer,
        "examples": int(present.sum()),
        "classes": len(present),
        "dimension": _dim(found),
    }
    facts |= {
        "missing_classes": found.missing,
        "examples_per_class": [int(present.min()), int(present.max())],
    }
    facts |= {
        "loss": arguments.loss,
        "weight_decay": arguments.weight_decay,
        "global_mean": arguments.global_mean,
    }
    return facts | {"notes": found.cautions + found.notes, "metrics": found.metrics}


def _dim(found: "Measurement") -> int:
    return found.centred.shape[1]


# Of a table of layers.
_BY_LAYER = (
    "nc1",
    "nc1_rank",
    "nc1_trace_ratio",
    "cdnv",
    "nc2_equinorm_means",
    "nc2_equiangular_means",
    "etf_error",
)


def _print(
    layers: list[str], found: list["Measurement"], global_mean: str, console: "Console"
) -> None:
    from rich.table import Table

    from ncjax.metrics.vocabulary import VOCABULARY
    from ncjax.report import tables

    if len(found) > 1:
        table = Table(title="Layers in forward order")
        table.add_column("layer", overflow="fold")
        for name in ("p", *_BY_LAYER):
            table.add_column(name.replace("_means", ""), justify="right", no_wrap=True)
        for layer, one in zip(layers, found, strict=True):
            table.add_row(
                printable(layer),
                str(_dim(one)),
                *(f"{one.metrics[name]:.3g}" for name in _BY_LAYER),
            )
        console.print(table)
    last = found[-1]
    present = last.examples[last.examples > 0]
    table = Table(title=printable(f"{layers[-1]}: {last.headline}"))
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("meaning")
    for name, value in last.metrics.items():
        table.add_row(name, f"{value:.4g}", VOCABULARY[name].definition)
    console.print(table)
    if last.missing:
        shown = ", ".join(map(str, last.missing[:10])) + (", ..." if len(last.missing) > 10 else "")
        verbs = (
            "class has no example and is"
            if len(last.missing) == 1
            else "classes have no example and are"
        )
        tables.say(console, f"{len(last.missing):,} {verbs} left out: {shown}")
    if present.min() < present.max():
        means = {"classes": "the class means, each counting once", "examples": "all examples"}[
            global_mean
        ]
        console.print(
            f"classes have {present.min():,} to {present.max():,} examples; mu_G is the mean of "
            f"{means}"
        )
    for layer, one in zip(layers, found, strict=True):
        for note in one.cautions + one.notes:
            tables.say(console, note if len(found) == 1 else f"{layer}: {note}")

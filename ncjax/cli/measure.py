"""Neural collapse of any model's features: class means, NC1 to NC4, and with weight decay its
head's equilibrium.

    ncjax measure feats.npz --head head.npz
    ncjax measure layer1.npy layer2.npy layer3.npy --labels labels.npy --figures figures
    ncjax measure feats.safetensors --head head.safetensors --weight-decay 5e-4 \\
        --loss cross_entropy --json
    ncjax measure feats.csv --head checkpoint.pt --head-prefix fc --by-class --csv

FEATURES is .npz, .safetensors, .pt, .h5 or .parquet with `features` (N, p), `labels` (N,) from 0 to
C - 1 (or `label`, `target`, `class`, `y`) and, where outputs should not be computed from the head,
`logits` (N, C); .npy with features alone; or .csv, whose columns are features but one of labels.
.npz, .npy and .safetensors are memory-mapped (a compressed .npz is not). --head has `weight` (C, p)
and `bias` (C,) of PyTorch's Linear, also named `head_kernel` and `head_bias`, or is a whole
state_dict. Several files are layers, in forward order, of which the last feeds the head; one has
labels, or all have the same.

In Python: `ncjax.measure(features, labels, head=W, bias=b)`; docs/measure.md. Exit codes:
0; 2: bad input.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ncjax import environment
from ncjax.cli import command
from ncjax.errors import InputError, printable
from ncjax.features import files
from ncjax.features.measure import measure_batches
from ncjax.features.pooling import POOLS
from ncjax.paths import expanded, make_folder

if TYPE_CHECKING:
    from rich.console import Console

    from ncjax.features.result import Measurement

# That `feature_figures` draws; it would import matplotlib.
FIGURES = ("spectrum", "angles", "classes", "layers")


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
        help=".npz, .npy, .safetensors, .pt, .h5, .parquet or .csv; several: layers",
    )
    add(
        "--head",
        metavar="FILE",
        type=Path,
        help="head_kernel or weight (C, p), head_bias or bias (C,); .npy: the kernel alone",
    )
    add(
        "--labels",
        metavar="FILE",
        type=Path,
        help="labels (N,), where the files of features have none, or the same",
    )
    add("--features-key", metavar="NAME", help="array of features, where it has another name")
    add("--labels-key", metavar="NAME", help="array of labels, where it has another name")
    add(
        "--head-prefix",
        metavar="MODULE",
        help="of a whole state_dict in --head: whose weight and bias, as in fc",
    )
    add(
        "--pool",
        choices=POOLS,
        help="makes (N, p) of features N x C x H x W or N x tokens x p",
    )
    add("--ignore-label", metavar="L", type=int, help="leaves out examples of this label")
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
    command.add_style(parser, FIGURES)
    add(
        "--ood",
        metavar="FILE",
        type=Path,
        help="features of out-of-distribution examples, of the last layer: nc5 and ood_auroc",
    )
    add(
        "--by-class",
        action="store_true",
        help="a row per class of the last layer: examples, variance, norm, nearest rival, angle",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--json",
        action="store_true",
        help="one JSON object; its `metrics` are flat, null where undefined",
    )
    output.add_argument(
        "--csv",
        action="store_true",
        help="a row per layer and a column per metric; with --by-class a row per class",
    )
    output.add_argument(
        "--latex",
        action="store_true",
        help="a tabular with a row per metric and a column per layer; with --by-class, per class",
    )
    return parser.parse_args(argv)


def _measure_files(arguments: argparse.Namespace) -> int:
    # No JAX yet: what is wrong with a file is said at once.
    for name, value in (("--batch", arguments.batch), ("--classes", arguments.classes)):
        if value is not None and value < 1:
            raise InputError(name, value, "give a number from 1 on")
    _check_style(arguments)
    kernel = bias = None
    if arguments.head is not None:
        arrays = files.read(expanded("--head", arguments.head), "head_kernel")
        kernel, bias = files.find_head(arguments.head, arrays, arguments.head_prefix)
    batches = _read_layers(arguments)
    ood = None if arguments.ood is None else _read_outliers(arguments)
    if arguments.figures is not None:
        make_folder("--figures", expanded("--figures", arguments.figures))
    environment.import_jax()
    from ncjax.features import measurement, streaming  # noqa: F401 (before the progress bar hides the cursor)
    from ncjax.training import parallel

    parallel.use_every_core()
    from ncjax.features.streaming import check_num_classes

    if arguments.classes is not None:
        check_num_classes("--classes", arguments.classes, max(own.shape[1] for own, *_ in batches))
    options: dict[str, Any] = {
        "num_classes": arguments.classes or (len(kernel) if kernel is not None else None),
        "loss": arguments.loss,
        "global_mean": arguments.global_mean,
        "pool": arguments.pool,
        "ignore_label": arguments.ignore_label,
        "float64": arguments.float64 or None,
        "rows": arguments.batch,
    }
    of_last = {"weight_decay": arguments.weight_decay, "head": kernel, "bias": bias, "ood": ood}
    found = []
    with _progress(2 * sum(len(own) for _, own, *_ in batches if own.ndim)) as advance:
        for batch in batches:
            options |= of_last if batch is batches[-1] else {}
            found.append(measure_batches([batch], progress=advance, **options))
    return _report(arguments, found)


def _check_style(arguments: argparse.Namespace) -> None:
    """Raises InputError for flags of figures that none would be drawn by."""
    for name in ("only", "format", "width", "style"):
        if arguments.figures is None and (value := getattr(arguments, name)):
            raise InputError(f"--{name}", value, "it chooses figures; name a folder by --figures")
    if "layers" in arguments.only and len(arguments.features) == 1:
        way_out = "of one file there is none that compares layers; give several, or leave it out"
        raise InputError("--only", "layers", way_out)


def _read_layers(arguments: argparse.Namespace) -> list[tuple[np.ndarray, ...]]:
    """Returns (features, labels) or (features, labels, logits) of each file; or InputError."""
    held: dict[Path, np.ndarray] = {}
    labels_key = arguments.labels_key
    if arguments.labels is not None:
        held[arguments.labels] = _read_labels(arguments.labels, labels_key)
        labels_key = None
    found = []
    for path in arguments.features:
        arrays = files.read(expanded("features", path), arguments.features_key or "features")
        found.append(files.find_examples(path, arrays, arguments.features_key, labels_key))
        if len(found[-1].features) != len(found[0].features):
            way_out = (
                f"layers are of the same examples, of which {arguments.features[0]} has "
                f"{len(found[0].features)}"
            )
            raise InputError(str(path), f"{len(found[-1].features)} examples", way_out)
        own = files.find_labels(path, arrays, labels_key)
        if own is not None:
            held[path] = own
    labels = _sole_labels(arguments.features[0], held)
    return [(one.features, labels, *(() if one.logits is None else (one.logits,))) for one in found]


def _sole_labels(features: Path, held: dict[Path, np.ndarray]) -> np.ndarray:
    """Returns the labels that files hold, or raises InputError where these are none or differ."""
    if not held:
        way_out = "no array is named labels; add it, name it by --labels-key, or give --labels"
        raise InputError(str(features), "no labels", way_out)
    (first, labels), *others = held.items()
    for path, other in others:
        if not np.array_equal(labels, other):
            way_out = "all are of the same examples in one order; remove the labels that are wrong"
            raise InputError(str(path), f"other labels than {first}", way_out)
    return labels


def _read_outliers(arguments: argparse.Namespace) -> np.ndarray:
    key = arguments.features_key
    arrays = files.read(expanded("--ood", arguments.ood), key or "features")
    return files.find_examples(arguments.ood, arrays, key, None).features


def _read_labels(path: Path, labels_key: str | None) -> np.ndarray:
    arrays = files.read(expanded("--labels", path), labels_key or "labels")
    labels = files.find_labels(path, arrays, labels_key)
    if labels is None:
        shown = files.described(arrays)
        raise InputError("--labels", str(path), f"it has no labels, but {shown}; --labels-key")
    return labels


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
    named = dict(zip(layers, found, strict=True))
    is_data = arguments.json or arguments.csv or arguments.latex
    if arguments.json:
        described = [_describe(arguments, layer, one) for layer, one in named.items()]
        if arguments.by_class:
            described[-1]["by_class"] = found[-1].by_class().reset_index().to_dict("records")
        whole = described[0] if len(described) == 1 else {"layers": described}
        print(json.dumps(journal.strict(whole)))
    elif is_data:
        print(_as_table(arguments, named), end="")
    else:
        _print(layers, found, arguments.global_mean, tables.make_console())
        if arguments.by_class:
            tables.show_by_class(found[-1].by_class(), tables.make_console())
    if arguments.figures is not None:
        from ncjax.report import feature_figures

        console = tables.make_console(stderr=is_data)
        names = dict.fromkeys(path.stem for path in arguments.features)
        shown = names if len(names) == len(layers) else layers
        folder = expanded("--figures", arguments.figures)
        style = command.style_of(arguments)
        for path in feature_figures.write(dict(zip(shown, found, strict=True)), folder, style):
            tables.say(console, f"figure: {path}")
    return 0


def _as_table(arguments: argparse.Namespace, named: dict[str, "Measurement"]) -> str:
    """Returns what --csv or --latex prints, --latex with four digits."""
    from ncjax.features.result import LayerMeasurements
    from ncjax.report import tables

    if arguments.by_class:
        frame = list(named.values())[-1].by_class()
        return frame.to_csv() if arguments.csv else tables.as_latex(frame)
    frame = LayerMeasurements(named).to_dataframe()
    return frame.to_csv() if arguments.csv else tables.as_latex(frame.T.rename_axis("metric"))


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
        "examples_per_class": {"least": int(present.min()), "greatest": int(present.max())},
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

    from ncjax.metrics.vocabulary import FEATURE_VOCABULARY
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
        table.add_row(name, f"{value:.4g}", FEATURE_VOCABULARY[name].definition)
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

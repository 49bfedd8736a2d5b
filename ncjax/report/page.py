"""Writes the HTML report: one file that needs no network, of one run or of several compared.

The page is a Jinja2 template that escapes whatever it is given; numbers travel beside it, bit for
bit (`report.numbers`), and a script of ours draws them with Apache ECharts. A content security
policy names the hashes of the two scripts, so that nothing else is executed and nothing fetched.
"""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import xarray as xr

from ncjax import config as configuration
from ncjax.config import Config
from ncjax.errors import printable
from ncjax.metrics.vocabulary import BUDGET_TERMS, VOCABULARY
from ncjax.report import headline, numbers, thinning
from ncjax.storage import history as histories
from ncjax.storage import monitored
from ncjax.storage.files import write_atomically
from ncjax.variation import Variation, from_stored

FILE = "report.html"  # of one run, in its WORKDIR

_PANELS = ("nc1", "nc2_equinorm_means", "nc2_equiangular_means", "nc3", "nc4", "accuracy")
_COLUMNS = (
    *_PANELS,
    "nc3_centered",
    "epsilon",
    "delta",
    "theorem_residual",
    "relaxation_time",
)
# Predictions of theory, by what is measured beside them; bounds and floors are found by name.
_PREDICTED = {"nc3": ("symmetric_nc3", "closed_form_nc3"), "epsilon": ("closed_form_epsilon",)}


class Source(NamedTuple):
    """Holds one history of a page.

    Attributes:
      name: what it is called on the page.
      history: of a sweep or of a monitored model.
      checksums: of its file and of the data it was trained on, by name.
    """

    name: str
    history: xr.Dataset
    checksums: Mapping[str, str]


def describe(workdir: Path, history: xr.Dataset, name: str = "") -> Source:
    """Returns the history of a WORKDIR as a page shows it, by default under the folder's name."""
    return Source(name or workdir.resolve().name, history, _read_checksums(workdir))


def _read_checksums(workdir: Path) -> dict[str, str]:
    """Returns the checksum of a WORKDIR's history, and those of its data where a checkpoint says
    them.
    """
    found = {
        "sha256 of history.nc": hashlib.sha256((workdir / "history.nc").read_bytes()).hexdigest()
    }
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return found
    from ncjax.storage import checkpoint

    for epoch in reversed(checkpoint.epochs_in(folder)):
        try:
            data = checkpoint.read_metadata(folder, epoch).data
        except checkpoint.Damaged:
            continue
        return found | {f"crc32 of {name}": f"{crc:08x}" for name, crc in data.items()}
    return found


def write(sources: list[Source], path: Path) -> None:
    """Writes the report of some histories to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(sources).encode())


def render(sources: list[Source], version: str = "") -> str:
    """Returns the report of some histories as HTML.

    Args:
      version: of what a server shows that is asked for newer ones; empty: there is none to ask.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(_asset),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    packed = numbers.pack({source.name: source.history for source in sources}, _COLUMNS)
    scripts = {name: _asset(f"{name}.js") for name in ("echarts.min", "report")}
    return environment.get_template("report.html.jinja").render(
        title=" and ".join(printable(source.name) for source in sources),
        style=_asset("report.css"),
        echarts=scripts["echarts.min"],
        script=scripts["report"],
        hashes=[_hash(script) for script in scripts.values()],
        page=_page(sources, packed) | {"version": version},
        is_watched=bool(version),
        numbers=packed.numbers,
        sources=[_described(source) for source in sources],
        differences=_differences(sources),
        metrics=numbers.describe_metrics(source.history for source in sources),
    )


def _asset(name: str) -> str:
    return (resources.files("ncjax.report") / "assets" / name).read_text("utf-8")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _page(sources: list[Source], packed: numbers.Packed) -> dict[str, Any]:
    """Returns what the script draws, but for the numbers."""
    variables = {name for source in packed.sources for name in source["variables"]}
    metrics = numbers.describe_metrics(source.history for source in sources)
    return {
        "sources": [
            described | {"focus": _focus(source.history)}
            for described, source in zip(packed.sources, sources, strict=True)
        ],
        "metrics": {name: metrics[name] for name in sorted(variables)},
        "panels": [name for name in _PANELS if name in variables],
        "columns": [name for name in _COLUMNS if name in variables],
        "causes": _causes(variables),
        "predictions": _predictions(variables),
    }


def _focus(history: xr.Dataset) -> int:
    """Returns the index of the run that single-run panels show first: that of the least NC3, the
    last layer of a monitored model.
    """
    if monitored.is_monitored(history):
        return history.sizes["layer"] - 1
    nc3 = history["nc3"] if "nc3" in history else history["nc1"]
    final = nc3.sel(split="train").isel(epoch=-1).transpose(*numbers.grid_of(history))
    return int(final.fillna(float("inf")).values.argmin())


def _predictions(variables: set[str]) -> list[dict[str, Any]]:
    """Returns pairs of what is measured and what bounds or predicts it."""
    pairs = {name: list(predicted) for name, predicted in _PREDICTED.items()}
    for name in sorted(variables):
        found = re.fullmatch(r"(\w+?)_(?:bound|floor)(_\w+)?", name)
        if found is None or _is_share(name):
            continue
        measure, which = found[1], found[2] or ""
        # NC2 has several measures: nc2_bound_equinorm is of nc2_equinorm_means, nc2_bound_etf of
        # etf_error.
        candidates = (f"{measure}{which}_means", f"{which.removeprefix('_')}_error", measure)
        measured = next((one for one in candidates if one in variables), "")
        pairs.setdefault(measured, []).append(name)
    found = {
        measured: [name for name in predicted if name in variables]
        for measured, predicted in pairs.items()
        if measured in variables
    }
    return [
        {"measured": measured, "predicted": predicted}
        for measured in VOCABULARY
        if (predicted := found.get(measured))
    ]


def _causes(variables: set[str]) -> list[list[str]]:
    """Returns groups of shares that are stacked: those of the head's budget, then `*_share_*`."""
    groups = {"budget": [f"budget_{term}" for term in BUDGET_TERMS]}
    for name in VOCABULARY:
        whole, share, _ = name.partition("_share_")
        if share:
            groups.setdefault(whole, []).append(name)
    found = [[name for name in group if name in variables] for group in groups.values()]
    return [group for group in found if group]


def _is_share(name: str) -> bool:
    """Returns whether a metric is a part of something, as a bound's term is of the bound."""
    return name in VOCABULARY and VOCABULARY[name].definition.startswith("share")


def _described(source: Source) -> dict[str, Any]:
    """Returns what the template says of a history: sentences, config, provenance."""
    history = source.history
    described = {
        "name": printable(source.name),
        "sentences": [printable(line) for line in headline.sentences(history)],
        "checksums": {printable(name): value for name, value in source.checksums.items()},
        "config": {},
        "vary": [],
        "config_file": "",
        "origin": {},
    }
    if monitored.is_monitored(history):
        return described
    config = configuration.from_json(history.attrs["config"])
    vary = _flags(from_stored(json.loads(history.attrs["config"])))
    versions = histories.versions(history)
    origin = {
        "device": history.attrs.get("device"),
        "git revision": history.attrs.get("git_revision"),
    }
    return described | {
        "config": {name: printable(_shown(v)) for name, v in _flat(config).items()},
        "vary": [printable(flag) for flag in vary],
        "config_file": _config_file(config),
        "origin": {name: printable(str(v)) for name, v in (origin | versions).items() if v},
    }


def _flags(variation: Variation | None) -> list[str]:
    """Returns what a command line says of the fields that vary."""
    flags = []
    for name, values in variation.values.items() if variation else ():
        between = ";" if any(isinstance(value, tuple) for value in values) else ","
        flags.append(shlex.quote(f"--config.{name}={between.join(map(_text, values))}"))
    return flags


def _flat(config: Config) -> dict[str, Any]:
    return configuration.flatten(configuration.to_mapping(config))


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _shown(value: Any) -> str:
    """Returns a value as a reader sees it: a few of thousands of seeds."""
    if isinstance(value, tuple):
        return thinning.abridged([str(one) for one in value]).replace(", ", ",")
    return str(value)


def _config_file(config: Config) -> str:
    """Returns a config file that trains the same sweep: the fields not at their default."""
    defaults = _flat(Config())
    lines = [
        f"    config.{name} = {value!r}"
        for name, value in _flat(config).items()
        if value != defaults[name]
    ]
    head = ["from ncjax.config import default_config", "", "", "def get_config():"]
    return "\n".join([*head, "    config = default_config()", *lines, "    return config", ""])


def _differences(sources: list[Source]) -> dict[str, list[str]]:
    """Returns the fields of configs in which sources differ, with the value in each; those that
    say where and how runs are computed are left out.
    """
    configs = [
        {}
        if monitored.is_monitored(source.history)
        else _flat(configuration.from_json(source.history.attrs["config"]))
        for source in sources
    ]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = {
        name: [config.get(name) for config in configs]
        for name in names
        if name not in configuration.MACHINE
    }
    return {
        name: ["" if value is None else printable(_text(value)) for value in row]
        for name, row in rows.items()
        if any(value != row[0] for value in row)
    }

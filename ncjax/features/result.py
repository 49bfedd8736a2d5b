"""Defines what a measurement of features returns: numbers by name, as a table, as data."""

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Num

from ncjax.metrics.vocabulary import FEATURE_VOCABULARY, Metric

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


@dataclass(frozen=True, eq=False, repr=False)
class Measurement(Mapping[str, float]):
    """Holds the metrics of a set of features, by name: `m.nc1` and `m["nc1"]` are the same number.

    `print(m)` shows them as a table with their definitions, and so does a notebook. A metric that
    is not defined for these features is NaN, and `notes` says why; one that needs what was not
    given (a head, weight decay) is not there. docs/theory.md derives them.

    Attributes:
      metrics: name in the vocabulary -> number.
      examples: number of examples of every class, those without any too.
      missing: the classes without an example, which are left out of everything else.
      spectrum: eigenvalues of Sigma_B, descending.
      within: Sigma_W along their eigenvectors.
      variances: v_c, mean ||h - mu_c||^2, of each class that has examples.
      centred: mu_c - mu_G of those classes as rows.
      cautions: what would mislead a reader of these numbers.
      notes: what was left out and why, and what is undefined.
      unit: the unit of these arrays; 1 except where squares of features leave float64.

    Examples:
      >>> import numpy as np, ncjax
      >>> features = np.array([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [-1.0, -0.5]])
      >>> m = ncjax.measure(features, np.array([0, 0, 1, 1]))
      >>> m.cdnv, m["cdnv"], len(m), "nc3" in m
      (0.0625, 0.0625, 12, False)
      >>> float(m.to_dataset()["cdnv"])
      0.0625
    """

    metrics: dict[str, float]
    examples: Num[np.ndarray, " all"]
    missing: list[int]
    spectrum: Float[np.ndarray, " k"]
    within: Float[np.ndarray, " k"]
    variances: Float[np.ndarray, " C"]
    centred: Float[np.ndarray, "C p"]
    cautions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unit: float = 1.0

    def __post_init__(self) -> None:
        order = [*FEATURE_VOCABULARY, *self.metrics]
        ordered = dict(sorted(self.metrics.items(), key=lambda item: order.index(item[0])))
        object.__setattr__(self, "metrics", ordered)

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    def __getattr__(self, name: str) -> float:
        metrics = self.__dict__.get("metrics", {})
        if name in metrics:
            return metrics[name]
        needs = "; it needs what was not given, as a head" if name in FEATURE_VOCABULARY else ""
        raise AttributeError(f"this measurement has no {name}{needs}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.metrics]

    @property
    def headline(self) -> str:
        """Returns how much was measured, in a line."""
        present = self.examples[self.examples > 0]
        return (
            f"{present.sum():,} examples of {len(present):,} classes, "
            f"{self.centred.shape[1]:,} features"
        )

    def to_dataset(self) -> "xr.Dataset":
        """Returns the metrics as labelled scalars, and `examples` and `class_variance` by class.

        Cautions and notes are attributes, a line each.
        """
        import xarray as xr

        variables: dict[str, Any] = {
            name: ((), value, _entry(name).attributes) for name, value in self.metrics.items()
        }
        present = np.flatnonzero(self.examples)
        variables["examples"] = (("label",), self.examples[present], {"long_name": "examples"})
        spread = {"long_name": "mean ||h - mu_c||^2", "units": "1"}
        variables["class_variance"] = (("label",), self.variances * self.unit**2, spread)
        attrs = {"cautions": "\n".join(self.cautions), "notes": "\n".join(self.notes)}
        return xr.Dataset(variables, {"label": present}, attrs)

    def to_dataframe(self) -> "pd.DataFrame":
        """Returns a table with a row per metric: value, definition and best value."""
        import pandas as pd

        rows = {
            name: {
                "value": value,
                "definition": _entry(name).definition,
                "best": _entry(name).best,
            }
            for name, value in self.metrics.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")

    def by_class(self) -> "pd.DataFrame":
        """Returns a table with a row per class that has examples.

        Its columns are `examples`, `variance` v_c, `norm` ||mu_c - mu_G||, `rival`, the class with
        the nearest mean, and `angle` between the two centred means, in degrees.
        """
        import pandas as pd

        present = np.flatnonzero(self.examples)
        norms = np.linalg.norm(self.centred, axis=1)
        rivals, angles = [], []
        for place, row in enumerate(self.centred):
            distances = np.sum((self.centred - row) ** 2, axis=1)
            distances[place] = np.inf
            rival = int(distances.argmin())
            with np.errstate(invalid="ignore"):
                cosine = self.centred[rival] @ row / (norms[rival] * norms[place])
            rivals.append(present[rival])
            angles.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
        columns = {
            "examples": self.examples[present],
            "variance": self.variances * self.unit**2,
            "norm": norms * self.unit,
            "rival": rivals,
            "angle": angles,
        }
        return pd.DataFrame(columns, pd.Index(present, name="class"))

    def __repr__(self) -> str:
        width = max((len(name) for name in self.metrics), default=0)
        lines = [
            f"{name:<{width}}  {value:>10.4g}  {_entry(name).definition}"
            for name, value in self.metrics.items()
        ]
        remarks = [f"note: {remark}" for remark in (*self.cautions, *self.notes)]
        return "\n".join([self.headline, *lines, *remarks])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td style='text-align:right'>{value:.4g}</td>"
            f"<td style='text-align:left'>{html.escape(_entry(name).definition)}</td></tr>"
            for name, value in self.metrics.items()
        )
        remarks = "".join(f"<p>{html.escape(r)}</p>" for r in (*self.cautions, *self.notes))
        head = "<tr><th>metric</th><th>value</th><th>definition</th></tr>"
        return f"<p>{html.escape(self.headline)}</p><table>{head}{rows}</table>{remarks}"


@dataclass(frozen=True, eq=False, repr=False)
class LayerMeasurements(Mapping[str, Measurement]):
    """Holds the measurements of several layers of one model, by name and in forward order.

    `print(m)` and a notebook show a row per layer and a column per metric.

    Attributes:
      layers: name of the layer -> its `Measurement`.

    Examples:
      >>> import numpy as np, ncjax
      >>> rng = np.random.default_rng(0)
      >>> labels = np.arange(60) % 3
      >>> layers = {s: np.eye(3)[labels] + s * rng.standard_normal((60, 3)) for s in (0.5, 0.1)}
      >>> found = {f"noise {s}": ncjax.measure(h, labels) for s, h in layers.items()}
      >>> m = ncjax.LayerMeasurements(found)
      >>> [*m], m["noise 0.5"].cdnv > m["noise 0.1"].cdnv
      (['noise 0.5', 'noise 0.1'], True)
      >>> m.to_dataset()["cdnv"].dims
      ('layer',)
    """

    layers: dict[str, Measurement]

    def __getitem__(self, name: str) -> Measurement:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def to_dataset(self) -> "xr.Dataset":
        """Returns every metric by `layer`; NaN where a layer lacks it."""
        import xarray as xr

        names = self._metrics()
        variables = {
            name: (("layer",), [m.metrics.get(name, np.nan) for m in self.layers.values()])
            for name in names
        }
        data = xr.Dataset(variables, {"layer": list(self.layers)})
        for name in names:
            data[name].attrs.update(_entry(name).attributes)
        return data

    def to_dataframe(self) -> "pd.DataFrame":
        """Returns a table with a row per layer and a column per metric."""
        import pandas as pd

        rows = {name: one.metrics for name, one in self.layers.items()}
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=self._metrics())
        return frame.rename_axis("layer")

    def _metrics(self) -> list[str]:
        """Returns the metrics that any layer has, in the order of the vocabulary."""
        found = {name for one in self.layers.values() for name in one.metrics}
        return sorted(found, key=[*FEATURE_VOCABULARY, *sorted(found)].index)

    def __repr__(self) -> str:
        return self.to_dataframe().to_string(float_format="{:.4g}".format)

    def _repr_html_(self) -> str:
        return self.to_dataframe().to_html(float_format="{:.4g}".format)


def _entry(name: str) -> Metric:
    """Returns what the vocabulary says of a metric; its title alone of a name that it lacks."""
    return FEATURE_VOCABULARY.get(name) or Metric(name, definition="")

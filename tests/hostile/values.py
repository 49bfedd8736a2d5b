"""Types, sizes and layouts of what `ncjax.measure` is given; every number it returns is compared
with `oracle`.
"""

import contextlib
import functools
import io
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.hostile import oracle
from tests.hostile.engine import Failure

_C, _P, _N = 5, 16, 120
# Relative, by what the features are computed in: docs/measure.md promises as much.
_SINGLE, _DOUBLE = 1e-4, 1e-8
_SINGLES = ("float16", "float32", "bfloat16", "int8", "uint8", "int16", "uint16", "bool")

Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]


def _sample(classes: int = _C, dim: int = _P, examples: int = _N, noise: float = 1.0) -> Arguments:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(examples) % classes)
    means = 2 * rng.standard_normal((classes, dim))
    features = means[labels] + noise * rng.standard_normal((examples, dim))
    head = means / dim + rng.standard_normal((classes, dim)) / 30
    return {
        "features": features,
        "labels": labels,
        "head": head,
        "bias": rng.standard_normal(classes) / 10,
    }


# Changes of a sample: each takes the arguments of `measure` and gives others.


def _cast(name: str, dtype: Any, factor: float = 1.0, offset: Any = 0) -> Change:
    """Rounds after scaling, for integers; the offset is added in the new type."""

    def change(s: Arguments) -> Arguments:
        array = np.asarray(s[name], np.float64) * factor
        kind = np.dtype(dtype).kind
        if kind in "iu":
            array = np.rint(array) - (np.rint(array).min() if kind == "u" else 0)
        array = array.astype(dtype)
        return s | {name: array + np.asarray(offset).astype(dtype) if offset else array}

    return change


def _set(name: str, make: Callable[[Any], Any]) -> Change:
    return lambda s: s | {name: make(s[name])}


def _with(**options: Any) -> Change:
    return lambda s: s | options


def _chain(*changes: Change) -> Change:
    return lambda s: functools.reduce(lambda given, change: change(given), changes, s)


def _put(name: str, index: Any, value: Any) -> Change:
    def change(s: Arguments) -> Arguments:
        array = np.array(s[name])
        array[index] = value
        return s | {name: array}

    return change


def _logits(dtype: Any = np.float64, factor: float = 1.0) -> Change:
    def change(s: Arguments) -> Arguments:
        given = {name: value for name, value in s.items() if name not in ("head", "bias")}
        return given | {
            "logits": ((s["features"] @ s["head"].T + s["bias"]) * factor).astype(dtype)
        }

    return change


def _precise(s: Arguments) -> Arguments:
    """Everything in single precision."""
    return s | {name: s[name].astype(np.float32) for name in ("features", "head", "bias")}


def _misaligned(array: np.ndarray) -> np.ndarray:
    return (
        np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)
    )


def _one_example_each(s: Arguments) -> Arguments:
    return s | {"features": s["features"][:_C], "labels": np.arange(_C)}


def _issue_head(dim: int, dtype: Any) -> Arguments:
    """X = M[y] + 0.4 sqrt(p) noise with the head M in half precision: most of what it says lies
    below its rounding.
    """
    s = _sample(classes=10, dim=dim, examples=600)
    rng = np.random.default_rng(1)
    means = rng.standard_normal((10, dim))
    features = means[s["labels"]] + 0.4 * np.sqrt(dim) * rng.standard_normal((600, dim))
    return {
        "features": features.astype(np.float32),
        "labels": s["labels"],
        "head": means.astype(dtype),
    }


def _many_classes(offset: float) -> Arguments:
    """A float32 head whose rows have a large common part."""
    classes, dim = 1500, 32
    rng = np.random.default_rng(2)
    means = rng.standard_normal((classes, dim))
    labels = np.repeat(np.arange(classes), 2)
    features = (means[labels] + 0.05 * rng.standard_normal((len(labels), dim))).astype(np.float32)
    # Nearest means: W = mu, b = -||mu||^2/2; what all rows have in common moves all outputs alike.
    head = (means + offset).astype(np.float32)
    return {
        "features": features,
        "labels": labels,
        "head": head,
        "bias": -np.sum(means**2, axis=1) / 2,
    }


_TYPES = (
    "f2",
    ">f2",
    "f4",
    ">f4",
    "f8",
    ">f8",
    "longdouble",
    "i2",
    ">i2",
    "i4",
    "i8",
    ">i8",
    "u1",
    "u4",
    "u8",
)
_RIGHT: dict[str, Change] = {
    **{f"features {t}": _cast("features", t, 30) for t in _TYPES},
    "features bfloat16": _cast("features", ml_dtypes.bfloat16),
    **{
        f"features {t} about 1e7": _chain(
            _cast("features", t, 3, 10_000_000), _with(head=None, bias=None)
        )
        for t in ("f8", ">f8", "longdouble", "i4", "i8", ">i8")
    },
    "features f4 about 1e4": _chain(
        _cast("features", "f4", 1, 10_000), _with(head=None, bias=None)
    ),
    "features i8 about 2**60": _chain(
        _cast("features", "i8", 30, 2**60), _with(head=None, bias=None)
    ),
    "features u8 about 2**63": _chain(
        _cast("features", "u8", 30, 2**63), _with(head=None, bias=None)
    ),
    **{
        f"features {t} times {x:g}": _chain(_cast("features", t, x), _with(head=None, bias=None))
        for t, sizes in {
            "f8": (1e-300, 1e-200, 1e-150, 1e-30, 1e30, 1e150, 1e200, 1e300),
            "f4": (1e-36, 1e-30, 1e-20, 1e-12, 1e12, 1e15, 1e20, 1e30, 1e36),
            "longdouble": (1e-200, 1e200),
            "f2": (1e-2, 1e3),
        }.items()
        for x in sizes
    },
    **{
        f"features f8 times {x:g}, with a head": _set("features", functools.partial(np.multiply, x))
        for x in (1e-200, 1e-30, 1e30, 1e150, 1e200)
    },
    "features f4 times 1e20, with a head": _chain(_precise, _cast("features", "f4", 1e20)),
    "one column of features times 1e6": _put("features", (slice(None), 3), np.arange(_N) % 7 * 1e6),
    "one class of features times 1e-100": lambda s: (
        s | {"features": np.where(s["labels"][:, None] == 2, 1e-100, 1) * s["features"]}
    ),
    **{
        f"head {t}": _cast("head", t)
        for t in ("f2", ">f2", "f4", ">f4", ">f8", "longdouble", ml_dtypes.bfloat16)
    },
    **{f"head {t}": _cast("head", t, 100) for t in ("i1", "i8")},
    **{
        f"head {t} of float32 features": _chain(_precise, _cast("head", t))
        for t in ("f2", ml_dtypes.bfloat16, "f8", ">f8", "longdouble")
    },
    **{
        f"head times {x:g}": _set("head", functools.partial(np.multiply, x))
        for x in (1e-300, 1e-160, 1e-20, 1e20, 1e100, 1e160, 1e300)
    },
    **{
        f"head times {x:g}, features float32": _chain(_precise, _cast("head", "f8", x))
        for x in (1e-300, 1e-45, 1e-30, 1e20, 1e38, 1e60, 1e300)
    },
    "head bfloat16, p = 512": lambda s: _issue_head(512, ml_dtypes.bfloat16),
    "head float16, p = 2048": lambda s: _issue_head(2048, np.float16),
    "head bfloat16, p = 512, cross-entropy": lambda s: (
        _issue_head(512, ml_dtypes.bfloat16) | {"loss": "cross_entropy"}
    ),
    "head bfloat16, p = 512, float64": lambda s: (
        _issue_head(512, ml_dtypes.bfloat16) | {"float64": True}
    ),
    "head of 1500 classes": lambda s: _many_classes(0.0),
    "head of 1500 classes about 600": lambda s: _many_classes(600.0),
    "head rank 1": _put("head", (slice(None), slice(1, None)), 0),
    "head equal rows but one": lambda s: (
        s | {"head": np.ones_like(s["head"]) + np.eye(_C, _P)[:, :] * [[1e-6]]}
    ),
    "head row 0": _put("head", 1, 0.0),
    "bias times 1e200": _set("bias", functools.partial(np.multiply, 1e200)),
    "bias times 1e30 of float32": _chain(_precise, _cast("bias", "f8", 1e30)),
    "bias f2": _cast("bias", "f2"),
    "bias i8": _cast("bias", "i8", 10),
    **{
        f"logits {t}": _logits(t)
        for t in ("f2", "f4", ">f4", ">f8", "longdouble", ml_dtypes.bfloat16)
    },
    "logits i8": _logits("i8", 10),
    **{f"logits times {x:g}": _logits(factor=x) for x in (1e-200, 1e38, 1e200)},
    "logits times 1e30 of float32 features": _chain(_precise, _logits("f4", 1e30)),
    "logits times 300, cross-entropy": _chain(_logits(factor=300.0), _with(loss="cross_entropy")),
    "logits times 1e300, cross-entropy": _chain(_logits(factor=1e300), _with(loss="cross_entropy")),
    "logits -1e9 of a class, cross-entropy": _chain(
        _logits(), _put("logits", (slice(None), 2), -1e9), _with(loss="cross_entropy")
    ),
    **{f"labels {t}": _cast("labels", t) for t in ("i1", ">i2", ">i8", "u1", "u8", ">u4")},
    "labels strided": _set("labels", lambda a: np.repeat(a, 2)[::2]),
    "labels a list": _set("labels", lambda a: a.tolist()),
    "labels with a gap": _chain(
        _set("labels", lambda a: np.where(a == 4, 9, a)), _with(head=None, bias=None)
    ),
    "a class without examples": _set("labels", lambda a: np.where(a == 2, 1, a)),
    "two classes": lambda s: _sample(classes=2),
    "as many classes as features": lambda s: _sample(classes=_P),
    "more classes than features": lambda s: _sample(classes=24, dim=8, examples=240),
    "one feature": lambda s: _sample(classes=3, dim=1),
    "two examples, one of each class": lambda s: _sample(classes=2, examples=2),
    "Fortran order": _set("features", np.asfortranarray),
    "strided rows": _set("features", lambda a: np.repeat(a, 2, axis=0)[::2]),
    "strided columns": _set("features", lambda a: np.repeat(a, 2, axis=1)[:, ::2]),
    "reversed": _set("features", lambda a: a[::-1, ::-1].copy()[::-1, ::-1]),
    "misaligned": _set("features", _misaligned),
    "misaligned float32": _chain(_precise, _set("features", _misaligned)),
    "read-only": _set("features", lambda a: np.frombuffer(a.tobytes()).reshape(a.shape)),
    "a list of lists": _set("features", lambda a: a.tolist()),
    "np.matrix": _set("features", lambda a: np.asmatrix(a)),
    "head in Fortran order": _set("head", np.asfortranarray),
    "head as a list": _set("head", lambda a: a.tolist()),
    "head as the transpose of a view": _set("head", lambda a: a.T.copy().T),
    **{f"rows {n}": _with(rows=n) for n in (1, 7, 10**12)},
    **{f"weight decay {x:g}": _with(weight_decay=x) for x in (0.0, 1e-300, 1e-12, 1e-3, 1e3)},
    "weight decay 1e-3, float32": _chain(_precise, _with(weight_decay=1e-3)),
    "weight decay 1e-3, cross-entropy": _with(weight_decay=1e-3, loss="cross_entropy"),
    "weight decay 1e-3, head times 1e160": _chain(
        _set("head", functools.partial(np.multiply, 1e160)), _with(weight_decay=1e-3)
    ),
}

# Where a number is right by its definition and yet misleads, something must be said.
_NOTED: dict[str, Change] = {
    "every class has one example": _one_example_each,
    "one class has one example": lambda s: (
        s | {"labels": np.where(np.arange(_N) == 7, 5, s["labels"]), "head": None} | {"bias": None}
    ),
    "exact collapse": lambda s: s | {"features": s["features"][:_C][s["labels"]]},
    "head 0": _set("head", np.zeros_like),
    "head with equal rows": _set("head", np.ones_like),
}
# There is no right number where all means are one: what is found is rounding.
_SAID: dict[str, Change] = {
    "all features equal": _set("features", np.ones_like),
    "all features 0": _set("features", np.zeros_like),
    "all classes have one mean": lambda s: (
        s
        | {"features": np.repeat(s["features"][:24], _C, axis=0)}
        | {"labels": np.tile(np.arange(_C), 24)}
    ),
}

_REFUSED: dict[str, Change] = {
    **{
        f"features {np.dtype(t).name}": _set("features", lambda a, t=t: a.astype(t))
        for t in (complex, "c8", object, "S8", "U8", "M8[s]", "m8[s]", [("x", "f8")])
    },
    **{
        f"head {np.dtype(t).name}": _set("head", lambda a, t=t: a.astype(t))
        for t in (complex, object, "U8")
    },
    **{
        f"bias {np.dtype(t).name}": _set("bias", lambda a, t=t: a.astype(t))
        for t in (complex, object, "U8")
    },
    **{
        f"labels {np.dtype(t).name}": _set("labels", lambda a, t=t: a.astype(t))
        for t in (float, complex, object, "U8", "f2", "M8[s]")
    },
    "logits complex128": _logits(complex),
    "logits object": _logits(object),
    **{
        f"{value} in {name}": _put(name, index, value)
        for name, index in {"features": (17, 3), "head": (1, 2), "bias": 2}.items()
        for value in (np.nan, np.inf, -np.inf)
    },
    **{
        f"{value} in logits": _chain(_logits(), _put("logits", (4, 1), value))
        for value in (np.nan, np.inf)
    },
    "NaN in the last row alone": _put("features", -1, np.nan),
    "inf in float16 features": _chain(_cast("features", "f2"), _put("features", (0, 0), np.inf)),
    "a negative label": _put("labels", 3, -1),
    "a label of 2**40": _put("labels", 3, 2**40),
    "a label of 2**63": lambda s: (
        s | {"labels": np.where(np.arange(_N) == 3, 2**63, s["labels"].astype("u8"))}
    ),
    "labels beyond the head": _put("labels", 3, _C),
    "labels of two ones a row": _set(
        "labels", lambda a: np.eye(_C, dtype=int)[a] + np.eye(_C, dtype=int)[a - 1]
    ),
    "one class alone": _set("labels", np.zeros_like),
    "features of no row": lambda s: s | {"features": s["features"][:0], "labels": s["labels"][:0]},
    "features of no column": _set("features", lambda a: a[:, :0]),
    "features of one dimension": _set("features", lambda a: a[:, 0]),
    "features of three dimensions": _set("features", lambda a: a[:, :, None]),
    "features a number": _with(features=np.float64(3.0)),
    "features None": _with(features=None),
    "features a string": _with(features="features.npy"),
    "features ragged": _set("features", lambda a: [*a[:-1].tolist(), [1.0]]),
    "features masked": _set("features", lambda a: np.ma.masked_greater(a, 2.0)),
    "labels a number": _with(labels=np.int64(3)),
    "labels too few": _set("labels", lambda a: a[:-1]),
    "labels None": _with(labels=None),
    "labels masked": _set("labels", lambda a: np.ma.masked_equal(a, 3)),
    "logits a number": _with(logits=np.float64(1.0)),
    "logits a row too few": _chain(_logits(), _set("logits", lambda a: a[:-1])),
    "logits of another C": _chain(_logits(), _set("logits", lambda a: a[:, :-2])),
    "head transposed": _set("head", lambda a: a.T),
    "head a number": _with(head=np.float64(1.0)),
    "head a row": _set("head", lambda a: a[0]),
    "head empty": _set("head", lambda a: a[:0]),
    "bias without a head": _with(head=None),
    "bias a number": _with(bias=np.float64(1.0)),
    "bias a row too long": _set("bias", lambda a: np.append(a, 1.0)),
    **{
        f"num_classes {n!r}": _with(num_classes=n, head=None, bias=None)
        for n in (-1, 0, 1, 10**12, 10**30)
    },
    **{f"rows {n!r}": _with(rows=n) for n in (0, -1)},
    **{f"weight decay {x!r}": _with(weight_decay=x) for x in (-1.0, np.nan, np.inf)},
    "loss 'hinge'": _with(loss="hinge"),
    "global_mean 'x'": _with(global_mean="x"),
}


def _measure(arguments: Arguments) -> tuple[dict[str, float], list[str]]:
    """Returns (metrics, everything that was said)."""

    options = {
        name: value
        for name, value in arguments.items()
        if name not in ("features", "labels", "logits")
    }
    given = (arguments["features"], arguments["labels"])
    logits = arguments.get("logits")
    return measured([given if logits is None else (*given, logits)], **options)


def measured(batches: Any, **options: Any) -> tuple[dict[str, float], list[str]]:
    """Returns (metrics, everything that was said)."""
    from ncjax.features import measure

    err = io.StringIO()
    with contextlib.redirect_stderr(err), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = measure.measure_batches(batches, **options)
    return found.metrics, [
        *found.cautions,
        *found.notes,
        *(str(one.message) for one in caught),
        *err.getvalue().splitlines(),
    ]


@contextlib.contextmanager
def _refusals() -> Iterator[list[str]]:
    """Gives a list that holds the message of an InputError; any other exception is a failure."""
    from ncjax.errors import InputError

    said: list[str] = []
    try:
        yield said
    except InputError as refusal:
        said.append(str(refusal))
        if len(said[0].splitlines()) != 1:
            raise Failure("other", f"not one line: {refusal}") from refusal
    except Failure:
        raise
    except Exception as error:
        raise Failure("traceback", f"{type(error).__name__}: {error}") from error


def _tolerance(arguments: Arguments) -> float:
    dtype = np.asarray(arguments["features"]).dtype
    return (
        _SINGLE
        if str(dtype.newbyteorder("=")) in _SINGLES and not arguments.get("float64")
        else _DOUBLE
    )


def _check_right(change: Change, noted: bool, _: Path) -> None:
    arguments = change(_sample())
    with _refusals():
        found, said = _measure(arguments)
        right = oracle.expected(**arguments)
        size = max(
            (float(abs(right[name])) for name in ("epsilon", "delta") if name in right), default=1.0
        )
        examples = len(arguments["labels"])
        lines = oracle.wrong(found, right, _tolerance(arguments), examples, size)
        if lines:
            raise Failure("silent", f"{'; '.join(lines)} (it said {said})")
        if noted and not said:
            raise Failure("silent", f"nothing was said of {found}")


def _check_said(change: Change, _: Path) -> None:
    with _refusals():
        found, said = _measure(change(_sample()))
        if not said:
            raise Failure("silent", f"nothing was said of {found}")


def _check_refused(change: Change, _: Path) -> None:
    with _refusals() as said:
        found, notes = _measure(change(_sample()))
        said.append(f"{notes}")
        if not notes:
            raise Failure("silent", f"measured without a word: {found}")


# Batches: what a loader may do between the passes, and within one.


class _Loader:
    """Gives `passes` one after the other, the last one again and again."""

    def __init__(self, *passes: list):
        self._passes = list(passes)

    def __iter__(self) -> Iterator:
        return iter(self._passes.pop(0) if len(self._passes) > 1 else self._passes[0])


def _batches(s: Arguments, features: Any = None, labels: Any = None) -> list:
    features, labels = (
        (s["features"] if features is None else features),
        (s["labels"] if labels is None else labels),
    )
    return [(features[i : i + 40], labels[i : i + 40]) for i in range(0, len(labels), 40)]


def _first_in_float32(s: Arguments, features: np.ndarray) -> list:
    (first, labels), *others = _batches(s, features)
    return [(first.astype(np.float32), labels), *others]


def _noise(scale: float) -> Callable[[Arguments], tuple]:
    rng = np.random.default_rng(3)
    return lambda s: (
        _batches(s),
        _batches(s, s["features"] + scale * rng.standard_normal(s["features"].shape)),
    )


_LOADERS: dict[str, tuple[Callable[[Arguments], tuple], bool]] = {
    "the same twice": (lambda s: (_batches(s),), True),
    "another order": (lambda s: (_batches(s), _batches(s)[::-1]), True),
    "an empty batch": (lambda s: ([*_batches(s), (s["features"][:0], s["labels"][:0])],), True),
    "single rows": (
        lambda s: ([(x[None], y[None]) for x, y in zip(s["features"], s["labels"], strict=True)],),
        True,
    ),
    "float32 first, then float64 about 1e7": (
        lambda s: (_first_in_float32(s, np.rint(s["features"]) + 1e7),),
        True,
    ),
    "noise of 1 in the second pass": (_noise(1.0), False),
    "noise of 1e-2 in the second pass": (_noise(1e-2), False),
    "a shift of 0.1 in the second pass": (
        lambda s: (_batches(s), _batches(s, s["features"] + 0.1)),
        False,
    ),
    "mirrored in the second pass": (
        lambda s: (_batches(s), _batches(s, s["features"][:, ::-1])),
        False,
    ),
    "other labels in the second pass": (
        lambda s: (_batches(s), _batches(s, labels=np.roll(s["labels"], 1))),
        False,
    ),
    "other rows in the second pass": (
        lambda s: (_batches(s), _batches(s, np.roll(s["features"], 1, 0))),
        False,
    ),
    "fewer in the second pass": (lambda s: (_batches(s), _batches(s)[:-1]), False),
    "more in the second pass": (lambda s: (_batches(s), [*_batches(s), *_batches(s)[:1]]), False),
    "nothing in the second pass": (lambda s: (_batches(s), []), False),
    "one batch twice and one never": (
        lambda s: (_batches(s), [*_batches(s)[:2], _batches(s)[0]]),
        False,
    ),
    "NaN in the second pass": (
        lambda s: (_batches(s), _batches(_put("features", (3, 3), np.nan)(s))),
        False,
    ),
}

_NO_BATCHES: dict[str, Callable[[Arguments], Any]] = {
    "a generator": lambda s: (batch for batch in _batches(s)),
    "a dict": lambda s: {"features": s["features"], "labels": s["labels"]},
    "a list of dicts without names": lambda s: [{"x": s["features"], "y": s["labels"]}],
    "an empty list": lambda s: [],
    "features alone": lambda s: [(s["features"],)],
    "an array": lambda s: s["features"],
    "batches of other widths": lambda s: [
        (s["features"], s["labels"]),
        (s["features"][:, :3], s["labels"]),
    ],
    "some with logits": lambda s: [
        (s["features"], s["labels"]),
        (s["features"], s["labels"], np.ones((_N, _C))),
    ],
    "(model, loader)": lambda s: (print, [(s["features"], s["labels"])]),
}


def _check_loader(make: Callable[[Arguments], tuple], same: bool, _: Path) -> None:
    s = _sample()
    passes = make(s)
    with _refusals():
        found, said = measured(_Loader(*passes), num_classes=_C)
        h, y = (
            np.concatenate([np.asarray(batch[i], np.float64) for batch in passes[0]])
            for i in (0, 1)
        )
        lines = (
            oracle.wrong(found, oracle.expected(h, y), _DOUBLE, len(y))
            if same
            else ["the passes differ"]
        )
        if lines and not said:
            raise Failure("silent", f"{'; '.join(lines)}: {found}")


def _check_no_batches(make: Callable[[Arguments], Any], _: Path) -> None:
    with _refusals():
        found, said = measured(make(_sample()), num_classes=_C)
        if not said:
            raise Failure("silent", f"measured without a word: {found}")


def cases(_: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for name, change in _RIGHT.items():
        yield f"{name}: right", functools.partial(_check_right, change, False)
    for name, change in _NOTED.items():
        yield f"{name}: noted", functools.partial(_check_right, change, True)
    for name, change in _SAID.items():
        yield f"{name}: noted", functools.partial(_check_said, change)
    for name, change in _REFUSED.items():
        yield f"{name}: refused", functools.partial(_check_refused, change)
    for name, (make, same) in _LOADERS.items():
        yield f"loader, {name}", functools.partial(_check_loader, make, same)
    for name, make in _NO_BATCHES.items():
        yield f"batches, {name}", functools.partial(_check_no_batches, make)

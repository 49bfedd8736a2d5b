"""The architecture, read from source: imports go one way, and what must answer at once imports nothing slow."""

import ast
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "ncjax"
SLOW = {
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax",
    "jaxtyping",
    "xarray",
    "matplotlib",
    "tensorflow_datasets",
    "sklearn",
}

# What each module may import, besides the leaves; "*" is all but main.
LEAVES = {"cli", "environment", "errors", "files", "interrupts"}
ALLOWED = {
    "__init__": {"measure", "runs"},  # when asked for
    "errors": set(),
    "cli": {"interrupts"},
    "environment": {"errors"},
    "files": {"errors"},
    "interrupts": set(),
    "lock": {"errors"},
    "linalg": set(),
    "objective": set(),
    "optim": set(),
    "augment": set(),
    "conv": set(),
    "models": {"conv"},
    "parallel": set(),
    "config": set(),
    "data": {"tfds_folder"},
    "tfds_folder": set(),
    "checkpoint": set(),
    "report": {"history"},
    "collapse": {"linalg"},
    "theory": {"linalg"},
    "evaluate": {"collapse", "linalg", "models", "objective", "parallel", "theory"},
    "compilation": set(),
    "sweep": {"config", "data", "models", "objective", "parallel", "preflight", "train"},
    "outline": {"config", "models", "parallel", "preflight", "report", "sweep"},
    "provenance": {"parallel"},
    "distributed": {"config", "data", "preflight", "provenance"},
    "train": {"augment", "data", "evaluate", "models", "objective", "optim", "parallel"},
    "history": {"config"},
    "journal": {"history"},
    "closed_forms": set(),
    "panels": {"history"},
    "figures": {"history", "config", "panels"},
    "theory_figures": {"closed_forms", "figures", "history", "panels"},
    "plots": {"figures", "history", "report", "theory_figures"},
    "preflight": {"config", "data"},
    "experiment": "*",
    "main": {"config", "preflight", "experiment", "distributed"},
    "runs": {"checkpoint", "config", "data", "history", "models", "preflight"},
    "workdir": {
        *(
            "checkpoint",
            "config",
            "evaluate",
            "history",
            "models",
            "parallel",
            "preflight",
            "runs",
            "sweep",
            "theory",
            "train",
        ),
    },
    "show": {"history", "journal", "parallel", "report", "runs", "workdir"},
    "features": set(),
    "moments": set(),
    "streaming": {"moments"},
    "cautions": set(),
    "findings": {"cautions", "collapse", "linalg", "moments", "streaming", "theory"},
    "measure_figures": {"panels"},
    "measure": {
        *(
            "features",
            "findings",
            "history",
            "journal",
            "measure_figures",
            "moments",
            "parallel",
            "report",
            "streaming",
        ),
    },
}
MODULES = sorted(PACKAGE.glob("*.py"))
AT_ONCE = ("__init__", "cli", "environment", "main", "show", "measure", "features", "config", "data", "preflight")
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def imports(path, *, module_level_only=False):
    """Dotted names that a file imports. Type-checking blocks run nowhere and count at no level."""

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            elif not (module_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
                yield from walk(child)

    return set(walk(ast.parse(path.read_text())))


def siblings(names):
    """Modules of the package among dotted names; the bare package counts as __init__."""
    parts = [name.split(".") for name in names]
    inside = {p[1] if len(p) > 1 else "__init__" for p in parts if p[0] == "ncjax"}
    return {name if (PACKAGE / f"{name}.py").exists() else "__init__" for name in inside}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_one_way(path):
    allowed = ALLOWED[path.stem]
    if allowed == "*":
        allowed = {module.stem for module in MODULES} - {"main", path.stem}
    surplus = siblings(imports(path)) - {"__init__"} - (set() if path.stem in LEAVES else LEAVES) - allowed
    assert not surplus, f"{path.name} must not import {sorted(surplus)}"


@pytest.mark.parametrize(
    "path",
    [
        *(PACKAGE / f"{name}.py" for name in AT_ONCE),
        *CONFIGS,
    ],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_help_and_bad_input_wait_for_no_slow_import(path):
    """Neither the file nor anything it imports on import, however deep."""
    if not path.exists():
        pytest.skip(f"{path.name} does not exist yet")
    seen, waiting = set(), [path]
    while waiting:
        file = waiting.pop()
        seen.add(file)
        names = imports(file, module_level_only=True)
        slow = {name for name in names if name.split(".")[0] in SLOW}
        assert not slow, f"{file.name} imports {sorted(slow)} when it is imported"
        waiting += {PACKAGE / f"{name}.py" for name in siblings(names)} - seen


def test_only_experiment_and_what_stands_above_it_read_configs():
    readers = {path.stem for path in MODULES if {"ml_collections", "absl"} & {n.split(".")[0] for n in imports(path)}}
    assert readers <= {"config", "preflight", "main"}


def test_no_module_takes_a_name_of_the_standard_library():
    assert not {path.stem for path in MODULES} & sys.stdlib_module_names - {"__init__"}


def test_the_package_stays_under_10000_lines():
    assert 1000 < sum(len(path.read_text().splitlines()) for path in MODULES) < 10000


def test_the_check_sees_imports_inside_functions_and_skips_type_checking_ones(tmp_path):
    source = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from ncjax import main as m\n    import d\n"
    (tmp_path / "m.py").write_text(source)
    assert imports(tmp_path / "m.py") == {"a.b", "ncjax.main", "d"}
    assert imports(tmp_path / "m.py", module_level_only=True) == {"a.b"}
    assert siblings({"ncjax.main", "jax"}) == {"main"}

"""The architecture, read from source: what must answer at once imports nothing slow. That imports
go down the list of folders is for import-linter to say (pyproject.toml)."""

import ast
import sys

import pytest

from tests.helpers import ROOT

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
MODULES = sorted(PACKAGE.rglob("*.py"))
AT_ONCE = (
    *(
        "__init__.py",
        "__main__.py",
        "main.py",
        "api.py",
        "environment.py",
        "paths.py",
        "config.py",
        "plan.py",
    ),
    *("cli/choose.py", "cli/command.py", "cli/train.py", "cli/show.py", "cli/measure.py"),
    *("data/dataset.py", "features/files.py", "features/measure.py"),
)
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
            elif not (
                module_level_only
                and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            ):
                yield from walk(child)

    return set(walk(ast.parse(path.read_text())))


def inside(names):
    """The files of the package that are run when dotted names are imported."""
    files = set()
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1 if parts[0] == "ncjax" else 0):
            path = ROOT.joinpath(*parts[:end])
            files |= {
                file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()
            }
    return files


@pytest.mark.parametrize(
    "path",
    [*(PACKAGE / name for name in AT_ONCE), *CONFIGS],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_help_and_bad_input_wait_for_no_slow_import(path):
    """Neither the file nor anything it imports on import, however deep."""
    seen, waiting = set(), [path]
    while waiting:
        file = waiting.pop()
        seen.add(file)
        names = imports(file, module_level_only=True)
        slow = {name for name in names if name.split(".")[0] in SLOW}
        assert not slow, f"{file.name} imports {sorted(slow)} when it is imported"
        waiting += inside(names) - seen


def test_untyped_configs_end_where_the_command_line_is_read():
    readers = {
        path
        for path in MODULES
        if {"ml_collections", "absl"} & {n.split(".")[0] for n in imports(path)}
    }
    assert readers == {PACKAGE / "cli/train.py"}


def test_no_module_takes_a_name_of_the_standard_library():
    """Those of the first level: `python ncjax/plan.py` has their folder on its path."""
    assert not {path.stem for path in PACKAGE.glob("*.py")} & sys.stdlib_module_names - {"__init__"}


def test_the_check_sees_imports_inside_functions_and_skips_type_checking_ones(tmp_path):
    source = (
        "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from ncjax.cli import train "
        "as m\n    import d\n"
    )
    (tmp_path / "m.py").write_text(source)
    assert imports(tmp_path / "m.py") == {"a.b", "ncjax.cli.train", "d"}
    assert imports(tmp_path / "m.py", module_level_only=True) == {"a.b"}
    expected = {PACKAGE / name for name in ("__init__.py", "cli/__init__.py", "cli/train.py")}
    assert inside({"ncjax.cli.train.main", "jax"}) == expected

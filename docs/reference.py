"""Writes docs/reference.md, the reference of every public name, from its docstring.

python -m docs.reference
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ncjax
from ncjax.config import describe_fields

PAGE = Path(__file__).with_name("reference.md")
_HEAD = """\
# Reference

Written by `python -m docs.reference` from the docstrings; a test executes their examples.
"""
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|References|Examples):")
_ENTRY = re.compile(r"[\w*(][\w*, ()]*: ")
_WIDTH = 96


def render() -> str:
    """Returns the whole page."""
    parts = [_HEAD, *_render_module(ncjax), "## Fields of a config\n"]
    fields = describe_fields().replace("  --config.", "").replace("      ", "    ")
    return "\n".join([*parts, f"```text\n{fields}\n```\n"])


def _render_module(module: ModuleType) -> Iterator[str]:
    """Yields the parts of the page on a module's public names; those of its modules follow."""
    names = {name: getattr(module, name) for name in module.__all__}
    modules = {name for name, value in names.items() if isinstance(value, ModuleType)}
    for name in sorted(names.keys() - modules):
        yield from _render_name(f"{module.__name__}.{name}", names[name])
    for name in sorted(modules):
        yield f"## `{module.__name__}.{name}`\n"
        yield _format_docstring(inspect.getdoc(names[name]) or "")
        yield from _render_module(names[name])


def _render_name(name: str, value: Any) -> Iterator[str]:
    """Yields the parts of the page on a function, or on a class and its public members."""
    node = _parse_source(value)
    yield f"## `{name}`\n"
    if isinstance(node, ast.FunctionDef):
        yield _format_signature(node, name)
    yield _format_docstring(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                yield f"### `{name}.{member.name}`\n"
                yield _format_signature(member, member.name)
                yield _format_docstring(ast.get_docstring(member) or "")


def _parse_source(value: Any) -> ast.FunctionDef | ast.ClassDef:
    # The source says how a signature was written; the object may be wrapped by a type checker.
    node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    return node


def _format_signature(node: ast.FunctionDef, name: str) -> str:
    """Returns a signature as a block of code, a parameter per line where one line is too short."""
    for part in ast.walk(node.args):
        if isinstance(part, ast.arg) and part.annotation:
            part.annotation = _unquoted(part.annotation)
    returned = f" -> {ast.unparse(_unquoted(node.returns))}" if node.returns else ""
    if any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list):
        return f"```python\n{name}{returned.replace(' ->', ':')}\n```\n"
    parameters = [text for text in _parameters(node.args) if text != "self"]
    line = f"{name}({', '.join(parameters)}){returned}"
    if len(line) > _WIDTH:
        line = "\n".join([f"{name}(", *(f"    {text}," for text in parameters), f"){returned}"])
    return f"```python\n{line}\n```\n"


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    required = [None] * (len(arguments.args) - len(arguments.defaults))
    for argument, default in zip(arguments.args, [*required, *arguments.defaults], strict=True):
        yield _parameter(argument, default)
    if arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(argument, default)
    if arguments.kwarg:
        yield f"**{ast.unparse(arguments.kwarg)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    return f"{ast.unparse(argument)} = {ast.unparse(default)}" if default else ast.unparse(argument)


def _unquoted(annotation: ast.expr) -> ast.expr:
    """Returns the type that an annotation in quotes names."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return ast.parse(annotation.value, mode="eval").body
    return annotation


def _format_docstring(text: str) -> str:
    """Returns a docstring as Markdown: sections become headings, and their entries lists."""
    lines: list[str] = []
    section = ""
    for block in re.split(r"\n(?=\S+:$)", text, flags=re.MULTILINE):
        first, _, rest = block.partition("\n")
        if _SECTION.fullmatch(first):
            section = first.removesuffix(":")
            lines += [f"**{section}**", "", _format_section(section, textwrap.dedent(rest)), ""]
        else:
            lines += [block.strip(), ""]
    return "\n".join(lines)


def _format_section(section: str, body: str) -> str:
    if section == "Examples":
        paragraphs = body.strip().split("\n\n")
        return "\n\n".join(
            f"```pycon\n{paragraph}\n```" if paragraph.startswith(">>>") else paragraph
            for paragraph in paragraphs
        )
    if section in ("Args", "Attributes", "Raises"):
        return "\n".join(
            re.sub(r"^(.*?): ", r"- `\1`: ", line) if _ENTRY.match(line) else line
            for line in body.strip().splitlines()
        )
    return body.strip()


if __name__ == "__main__":
    PAGE.write_text(render())

"""Configures the documentation site, which `make docs` builds by Sphinx from this repository's
Markdown as it stands: links between its files work in the site as they do without it.

The site needs no network. KaTeX sets formulas: its script comes with sphinxcontrib-katex, its
style and fonts lie in docs/assets.
"""

import os
import shutil
import sys
from pathlib import Path

import nbconvert
import nbformat
from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ncjax.cli import report  # noqa: E402
from ncjax.config import describe_fields  # noqa: E402

_DEMO = ROOT / "experiments" / "histories" / "digits.nc"
# What every build makes of other files of the repository.
_GENERATED = ROOT / "docs" / "generated"

project = "ncjax"
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "examples/*.ipynb",
    "experiments/README.md",
    "experiments/*/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
source_suffix = {".md": "markdown", ".ipynb": "notebook"}
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.katex"]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
# Docstrings write code in single backticks.
default_role = "code"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
python_display_short_literal_types = True

html_theme = "furo"
html_title = "ncjax"
html_show_copyright = False
html_static_path = ["assets"]
html_css_files = ["site.css"]
html_extra_path = ["generated/pages"]
html_copy_source = False
katex_css_path = "katex/katex.min.css"


def setup(app: Sphinx) -> None:
    app.add_source_parser(NotebookParser)
    app.connect("config-inited", lambda *_: _generate())
    app.connect("autodoc-process-signature", _without_factories)


def _without_factories(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str, returns: str
) -> tuple[str, str]:
    """Writes defaults that a dataclass makes as `...`, for <factory> is no Python."""
    return signature and signature.replace("<factory>", "..."), returns


class NotebookParser(MystParser):
    """Reads a notebook as the Markdown that nbconvert makes of it, with the outputs in it."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        notebook = nbformat.reads(inputstring, as_version=4)
        path = Path(document["source"])
        images = {
            "unique_key": path.stem,
            "output_files_dir": os.path.relpath(_GENERATED, path.parent),
        }
        text, resources = nbconvert.MarkdownExporter().from_notebook_node(notebook, images)
        for name, content in resources["outputs"].items():
            (path.parent / name).write_bytes(content)
        super().parse(text, document)


def _generate() -> None:
    """Writes what is made of other files: the fields of a config, the report of the demo, and the
    way from the first address of the site to its home.
    """
    shutil.rmtree(_GENERATED, ignore_errors=True)
    workdir, pages = _GENERATED / "digits", _GENERATED / "pages"
    workdir.mkdir(parents=True)
    pages.mkdir()
    (_GENERATED / "fields.txt").write_text(describe_fields().replace("  --config.", ""))
    shutil.copy(_DEMO, workdir / "history.nc")
    if report.main([str(workdir), f"--out={pages / 'report.html'}"]):
        raise ExtensionError("ncjax report of the demo failed")
    home = f"{root_doc}.html"
    (pages / "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={home}">\n')

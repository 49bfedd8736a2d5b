"""The documentation site: every link of every built page leads somewhere, nothing comes from the
network, and formulas are set.
"""

import importlib.util
import json
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from tests.helpers import ROOT
from tests.report.test_browser import browser as browser

_ADDRESSES = {"a": "href", "link": "href", "img": "src", "script": "src", "iframe": "src"}


class _Page(HTMLParser):
    """Collects the addresses, by tag, and the ids of a page."""

    def __init__(self, path):
        super().__init__()
        self.addresses, self.ids = [], {"", "top"}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        address = given.get(_ADDRESSES.get(tag, ""))
        if address and not address.startswith("data:"):
            self.addresses.append((tag, address))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("sphinxcontrib.katex") is None:
        pytest.skip("make docs installs what this takes")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "--keep-going", "-c", "docs", ".", out]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {path: _Page(path) for path in site.rglob("*.html") if path.parent.name != "_static"}


@pytest.mark.slow
def test_every_address_of_the_site_is_in_it(site, pages):
    missing, outside = [], set()
    for path, page in pages.items():
        for tag, address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                outside.add(tag)
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].ids if target in pages else {unquote(parts.fragment)}
            is_inside = target.is_file() and target.is_relative_to(site.resolve())
            if not is_inside or unquote(parts.fragment) not in known:
                missing.append((path.name, address))
    assert missing == []
    # Whoever follows a link may leave; a page loads nothing from elsewhere.
    assert outside <= {"a"}
    assert len(pages) > 30


@pytest.mark.slow
def test_pages_are_where_readers_look(site, pages):
    assert 'url=docs/index.html"' in (site / "index.html").read_text()
    report = (site / "report.html").read_text()
    assert "Neural collapse of digits" in report
    documented = pages[site / "docs" / "reference.html"].ids
    assert {"ncjax.train", "ncjax.Measurement.to_dataset", "ncjax.metrics.nc1"} <= documented
    assert "train.epochs=" in (site / "docs" / "reference.html").read_text()
    assert "load_wine" in (site / "examples" / "tutorial.html").read_text()


@pytest.mark.slow
def test_every_formula_of_theory_is_set(site, browser):
    browser.get((site / "docs" / "theory.html").as_uri())
    count = "return document.querySelectorAll(arguments[0]).length"
    formulas = browser.execute_script(count, ".math")
    assert browser.execute_script(count, ".math .katex") == formulas > 500
    assert browser.execute_script(count, ".katex-error") == 0


@pytest.mark.parametrize(
    "notebook", sorted(path.name for path in (ROOT / "examples").glob("*.ipynb"))
)
def test_notebooks_show_what_they_found(notebook):
    cells = json.loads((ROOT / "examples" / notebook).read_text())["cells"]
    assert any(output for cell in cells for output in cell.get("outputs", ()))

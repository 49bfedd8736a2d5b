"""The HTML report in a real browser, Debian's chromium without a window: what it draws, what it
fetches, what a click and a key do. Skipped where chromium or selenium is missing.
"""

import csv
import io
import itertools
import json
import os
import shutil
import threading

import numpy as np
import pytest

from ncjax.metrics.vocabulary import LAYER_VOCABULARY, VOCABULARY
from ncjax.report import page, watch
from ncjax.storage.history import COSINES
from tests.report.test_figures import changed, make_history
from tests.report.test_page import HOSTILE, hostile_history, monitor_history

pytestmark = pytest.mark.slow

EPOCHS = (0, 1, 2, 3, 6, 10, 17, 31, 54, 96, 170, 300)
DECAYS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("no chromium and chromedriver on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


class Opened:
    """A report that the browser shows."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(address)
        self.wait("document.documentElement.dataset.ready")

    def wait(self, condition):
        self.browser.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            f"const look = () => ({condition}) ? done() : setTimeout(look, 20); look();"
        )

    def js(self, script, *arguments):
        return self.browser.execute_script(f"return {script}", *arguments)

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def choose(self, name, value):
        script = (
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
        )
        self.browser.execute_script(script, self.find(f"#{name}"), value)

    def lines(self, panel="nc1"):
        """What is drawn in a panel: the shapes of all its curves."""
        script = "[...document.querySelectorAll(arguments[0])].map(p => p.getAttribute('d'))"
        return self.js(script, f"[data-metric={panel}] path[stroke-width='1.6']")

    def cells(self):
        script = "[...document.querySelectorAll('.grid td button')].map(b => b.dataset.value)"
        return np.array(self.js(script), np.float64)

    def legend(self):
        return self.js("[...document.querySelectorAll('#legend li')].map(li => li.textContent)")

    def table(self, kind):
        """The rows of the table as it is copied."""
        script = (
            "[...document.querySelectorAll('#results-tools button')]"
            ".find(b => b.textContent.endsWith(arguments[0])).click()"
        )
        self.browser.execute_script(script, kind)
        self.wait("document.querySelector('#results-tools textarea').value")
        return self.js("document.querySelector('#results-tools textarea').value")

    def requests(self):
        events = [json.loads(e["message"])["message"] for e in self.browser.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent]

    def errors(self):
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def opened(browser, tmp_path):
    def call(**histories):
        sources = [page.Source(name, history, {}) for name, history in histories.items()]
        page.write(sources, tmp_path / "report.html")
        return Opened(browser, (tmp_path / "report.html").as_uri())

    return call


def sweep(**axes):
    return make_history(
        epochs=EPOCHS, classes=10, **{"weight_decay": DECAYS, "seed": (0, 1, 2)} | axes
    )


@pytest.mark.parametrize(
    ("axes", "seconds"),
    [
        ({}, 2.0),
        ({"weight_decay": (0.0, *np.geomspace(1e-5, 1e-2, 49)), "seed": tuple(range(10))}, 5.0),
    ],
    ids=["18 runs", "500 runs"],
)
def test_it_is_soon_drawn_without_errors_and_fetches_nothing(opened, tmp_path, axes, seconds):
    shown = opened(run=sweep(**axes))
    (painted,) = shown.js(
        "performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)"
    )
    assert painted < 1000 * seconds
    assert float(shown.js("document.documentElement.dataset.ready")) < 1000 * seconds
    assert shown.errors() == []
    others = [url for url in shown.requests() if not url.startswith(("data:", "chrome:"))]
    assert others == [(tmp_path / "report.html").as_uri()]
    assert (tmp_path / "report.html").stat().st_size < 6e6
    assert len(shown.lines()) == len(axes.get("weight_decay", DECAYS))


def test_a_cell_draws_its_run_alone_and_once_more_all(opened):
    from selenium.webdriver.common.keys import Keys

    history = sweep()
    shown = opened(run=history)
    every = shown.lines()
    assert len(shown.legend()) == len(DECAYS)
    cell = shown.find(".grid td button[data-run='10']")
    cell.click()
    one = shown.lines()
    assert one != every
    assert shown.legend() == ["\N{GREEK SMALL LETTER LAMDA} = 0.001, seed = 1"]
    last = float(history["nc3"].isel(weight_decay=3, seed=1, epoch=-1).sel(split="train"))
    described = shown.find("[data-metric=nc3]").get_attribute("aria-label")
    assert f"ends at {last:.4g}" in described
    cell.send_keys(Keys.ENTER)
    assert shown.lines() == every
    # A row is all seeds of a weight decay; Ctrl adds another.
    rows = shown.browser.find_elements("css selector", ".grid tbody th button")
    rows[1].click()
    assert len(shown.legend()) == 1
    shown.browser.execute_script(
        "arguments[0].dispatchEvent(new MouseEvent('click', {ctrlKey: true}))", rows[2]
    )
    assert len(shown.legend()) == 2
    assert shown.errors() == []


def test_clock_scales_and_split_change_the_curves(opened):
    shown = opened(run=sweep())
    seen = [shown.lines()]
    for name, value in (
        ("clock", "relaxation_time"),
        ("x-scale", "linear"),
        ("y-scale", "linear"),
        ("split", "test"),
        ("split", "both"),
    ):
        shown.choose(name, value)
        seen.append(shown.lines())
    assert all(before != after for before, after in itertools.pairwise(seen))
    for name in ("layer-metric", "any-metric", "grid-metric"):
        values = shown.js(f"[...document.querySelectorAll('#{name} option')].map(o => o.value)")
        for value in values[:: max(1, len(values) // 8)]:
            shown.choose(name, value)
    assert shown.errors() == []


def test_the_pointer_shows_numbers_and_definitions(opened):
    from selenium.webdriver import ActionChains

    history = sweep()
    shown = opened(run=history)
    panel = shown.find("[data-metric=nc3]")
    shown.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", panel)
    ActionChains(shown.browser).move_to_element(panel).perform()
    shown.wait("document.querySelector('.tip') && document.querySelector('.tip').textContent")
    rows = shown.js(
        "[...document.querySelectorAll('.tip div')]"
        ".map(row => [...row.children].map(cell => cell.textContent))"
    )
    epoch = int(rows[0][1])
    wanted = history["nc3"].sel(split="train", epoch=epoch).mean("seed").values
    np.testing.assert_allclose([float(number) for _, number in rows[1:]], wanted, rtol=1e-4)
    height, width = panel.size["height"], panel.size["width"]
    ActionChains(shown.browser).move_to_element_with_offset(
        panel, 12 - width // 2, 10 - height // 2
    ).perform()
    shown.wait("document.querySelector('[data-metric=nc3]').title")
    assert VOCABULARY["nc3"].definition in panel.get_attribute("title")


def test_numbers_that_are_shown_are_those_of_the_history(opened):
    history = sweep()
    shown = opened(run=history)
    for name, split in (("nc1", "train"), ("nc3", "test"), ("nc3_floor", "train")):
        shown.choose("grid-metric", name)
        shown.choose("split", split)
        wanted = history[name].isel(epoch=-1)
        wanted = wanted.sel(split=split) if "split" in wanted.dims else wanted
        np.testing.assert_array_equal(shown.cells(), wanted.values.ravel())
    slider = shown.find("#grids input[type=range]")
    shown.browser.execute_script(
        "arguments[0].value = 2; arguments[0].dispatchEvent(new Event('input'))", slider
    )
    np.testing.assert_array_equal(shown.cells(), history["nc3_floor"].isel(epoch=2).values.ravel())
    shown.choose("rows", "runs")
    rows = list(csv.DictReader(io.StringIO(shown.table("CSV"))))
    assert len(rows) == 18
    for row, run in zip(rows, np.ndindex(6, 3), strict=True):
        found = float(row["nc4, train"])
        assert found == float(history["nc4"].sel(split="train").isel(epoch=2).values[run])


def test_tables_sort_and_copy_means_and_deviations(opened):
    history = sweep()
    shown = opened(run=history)
    nc1 = history["nc1"].sel(split="train").isel(epoch=-1).values.astype(np.float64)
    rows = list(csv.DictReader(io.StringIO(shown.table("CSV"))))
    found = np.array([[float(r["nc1, train"]), float(r["sd of nc1, train"])] for r in rows])
    np.testing.assert_allclose(found, np.stack([nc1.mean(1), nc1.std(1, ddof=1)], 1), rtol=1e-6)
    heading = shown.find("#results thead th:nth-child(2) button")
    heading.click()
    script = (
        "[...document.querySelectorAll('#results tbody tr')].map(r => r.cells[1].dataset.value)"
    )
    assert [float(value) for value in shown.js(script)] == sorted(found[:, 0])
    heading.click()
    assert [float(value) for value in shown.js(script)] == sorted(found[:, 0], reverse=True)
    lines = shown.table("LaTeX").splitlines()
    assert lines[0].startswith(r"\begin{tabular}{")
    assert all(line.endswith(r"\\") for line in lines[4:-2])
    assert r"\pm" in lines[4]
    assert r"nc1, train" in lines[2]
    assert r"nc2\_equinorm\_means" in lines[2]


def test_hostile_names_are_words(opened):
    shown = opened(**{HOSTILE: hostile_history(), "b": make_history()})
    for cell in shown.browser.find_elements("css selector", ".grid td button")[:3]:
        cell.click()
    shown.table("CSV")
    assert shown.js("document.querySelectorAll('img, iframe').length") == 0
    assert shown.js("document.scripts.length") == 4
    assert HOSTILE in shown.js("document.querySelector('h1').textContent")
    assert shown.errors() == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_in_light_and_dark(opened, width, scheme):
    shown = opened(run=sweep(learning_rate=(0.1, 0.2)), monitored=monitor_history())
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    shown.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    # Charts follow the width a moment later.
    shown.wait(f"document.documentElement.scrollWidth <= {width}")
    ink = shown.js("getComputedStyle(document.body).color")
    assert (min(json.loads(ink.removeprefix("rgb").translate({40: 91, 41: 93}))) > 128) == (
        scheme == "dark"
    )
    holders = "[...document.querySelectorAll('.chart')].filter(c => c.clientHeight)"
    assert all(shown.js(f"{holders}.map(c => c.getAttribute('aria-label'))"))
    assert all(shown.js(f"{holders}.map(c => c.querySelector('svg') !== null)"))
    shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert shown.js("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
    shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    shown.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert shown.errors() == []


@pytest.mark.parametrize("every", [False, True])
def test_what_is_printed_fits_the_paper(opened, every):
    shown = opened(digits=sweep())
    if every:
        shown.find("#every").click()
    # Letter and A4 have 96 points an inch, less margins: 970 across, where the table stands.
    shown.browser.set_window_size(970, 720)
    shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert shown.js("document.documentElement.scrollWidth") <= 970
        boxes = (
            "[...document.querySelectorAll('.chart')].filter(c => c.querySelector('svg')).map(c =>"
            " [c.getBoundingClientRect(), c.querySelector('svg').getBoundingClientRect()])"
            ".map(([c, s]) => [c.left, s.left, s.right, c.right])"
        )
        for left, drawn_left, drawn_right, right in shown.js(boxes):
            assert left - 1 <= drawn_left < drawn_right <= right + 1
        cells = (
            "[...document.querySelectorAll('#results tbody td')].filter(c => c.scrollWidth >"
            " c.clientWidth + 1).length"
        )
        assert shown.js(cells) == 0
        assert shown.js("document.querySelector('#results').className") == ("many" if every else "")
        # The first number of the first row is under its name in either form.
        name = shown.js("document.querySelector('#results tbody td').dataset.name")
        assert name == "nc1, train" or every
    finally:
        shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_whatever_can_be_chosen_is_reached_by_keys(opened):
    shown = opened(run=sweep(learning_rate=(0.1, 0.2)))
    unreachable = shown.js(
        "[...document.querySelectorAll('button, select, input, summary')]"
        ".filter(e => e.offsetParent && e.tabIndex < 0).length"
    )
    assert unreachable == 0
    unnamed = shown.js(
        "[...document.querySelectorAll('select, input, textarea')]"
        ".filter(e => !e.labels.length && !e.ariaLabel).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize(
    "history",
    [
        make_history(epochs=(0,)),
        make_history(weight_decay=(0.0,), seed=(0,)),
        make_history(weight_decay=(1e-3,), seed=(0,), learning_rate=(0.1, 0.2, 0.3)),
        monitor_history(),
    ],
    ids=["before training", "one run", "one decay", "monitored"],
)
def test_unusual_histories_are_drawn(opened, history):
    shown = opened(run=history)
    described = shown.find("[data-metric=nc1]").get_attribute("aria-label")
    assert "ends at" in described
    assert "no value" not in described
    assert shown.errors() == []


def test_a_history_without_a_finite_measurement_is_shown(opened):
    clocks = {"finite", "effective_decay", "flow_time", "relaxation_time"}
    names = {*VOCABULARY, COSINES} - clocks
    shown = opened(run=changed(make_history(), **dict.fromkeys(names, np.nan)))
    assert shown.cells().size == 4
    assert shown.errors() == []


def test_every_layer_of_the_focused_run_is_drawn(opened):
    shown = opened(run=make_history(vocabulary=VOCABULARY | LAYER_VOCABULARY))
    shown.choose("layer-metric", "layer_nc1")
    heading = shown.find("#layers").get_attribute("aria-label")
    assert LAYER_VOCABULARY["layer_nc1"].title in heading
    assert VOCABULARY["mode_eigenvalues"].title in shown.find("#modes").get_attribute("aria-label")
    assert shown.errors() == []


def test_a_watched_page_renews_itself_and_keeps_what_was_chosen(browser, tmp_path):
    file = tmp_path / "history.nc"
    file.touch()
    whole = sweep()
    newest = [whole.isel(epoch=slice(0, 6))]
    with watch.Server([file], lambda: [page.Source("run", newest[0], {})]) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        shown = Opened(browser, server.address)
        shown.choose("grid-metric", "nc3")
        shown.choose("y-scale", "linear")
        shown.find(".grid td button[data-run='10']").click()
        chosen = shown.legend()
        newest[0] = whole
        later = file.stat().st_mtime_ns + 10**9
        os.utime(file, ns=(later, later))
        shown.wait("document.querySelector('output').textContent === 'epoch 300'")
        shown.wait("document.documentElement.dataset.ready")
        assert shown.legend() == chosen
        wanted = whole["nc3"].isel(epoch=-1).sel(split="train").values.ravel()
        np.testing.assert_array_equal(shown.cells(), wanted)
        assert shown.js("document.querySelector('#y-scale').value") == "linear"
        assert shown.errors() == []
        server.shutdown()
        thread.join()

"""The HTML report: its numbers are those of the history, and nothing in it runs or fetches but its
own two scripts.
"""

import base64
import gzip
import hashlib
import json
from html.parser import HTMLParser

import numpy as np
import pytest

from ncjax import config as configuration
from ncjax.cli import report
from ncjax.metrics.vocabulary import FEATURE_VOCABULARY, LAYER_VOCABULARY, VOCABULARY
from ncjax.report import headline, numbers, page
from ncjax.storage import history as histories
from ncjax.storage import monitored, varied
from tests.report.test_figures import changed, diverge, make_history, save

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'\"&"


class Parsed(HTMLParser):
    """Reads what a browser would execute, fetch and show."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.tags, self.words, self._raw = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data):
        if self._raw and self.tags[-1][0] == "script":
            attrs, before = self.scripts[-1]
            self.scripts[-1] = attrs, before + data
        elif not self._raw:
            self.words.append(data)

    def handle_endtag(self, tag):
        self._raw = False

    def data(self, name):
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == name))


def render(**sources):
    return Parsed(
        page.render([page.Source(name, history, {}) for name, history in sources.items()])
    )


def monitor_history():
    metrics = {"nc1": 2.0, "nc3": 0.5, "nc4": 0.0, "nc2_equinorm_means": 0.1, "accuracy": 0.9}
    joined = None
    for epoch in (0, 5):
        layers = {"body": metrics, "fc": {"nc1": 0.25 / (1 + epoch), "nc3": 0.5}}
        joined = monitored.append(joined, monitored.one_epoch(epoch, layers, 0.1, "a remark"))
    return joined


@pytest.mark.parametrize(
    "history",
    [
        make_history(),
        make_history(learning_rate=(0.1, 0.2), seed=(3,)),
        diverge(make_history(), seed=1),
        monitor_history(),
    ],
    ids=["sweep", "three axes", "diverged", "monitored"],
)
def test_numbers_of_the_page_are_those_of_the_history_bit_for_bit(history):
    parsed = render(run=history)
    (packed,), (source,) = parsed.data("numbers"), parsed.data("page")["sources"]
    assert set(packed) == {
        name for name, variable in history.items() if np.isfinite(variable.values).any()
    }
    grid = [axis["name"] for axis in source["axes"]]
    for name, content in packed.items():
        described = source["variables"][name]
        found = np.frombuffer(gzip.decompress(base64.b64decode(content)), described["dtype"])
        wanted = history[name].transpose(*described["dims"]).values
        assert found.dtype.itemsize >= wanted.dtype.itemsize
        np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)
        assert described["dims"][: len(grid)] == grid or set(grid) - set(history[name].dims)
    assert source["epochs"] == history["epoch"].values.tolist()
    assert source["omitted"] == []


def test_what_packs_is_unpacked():
    history = make_history()
    packed = numbers.pack({"a": history, "b": history})
    for name in packed.numbers[1]:
        found = numbers.unpack(packed, 1, name)
        np.testing.assert_array_equal(found, history[name].transpose(*found.dims))


def test_every_number_has_its_definition():
    metrics = render(run=make_history()).data("page")["metrics"]
    assert set(metrics) <= {*VOCABULARY, histories.COSINES}
    for name in set(metrics) & set(VOCABULARY):
        assert metrics[name]["definition"] == FEATURE_VOCABULARY[name].definition
        assert metrics[name]["title"] == FEATURE_VOCABULARY[name].title


def test_numbers_of_every_layer_are_on_the_page_with_their_definitions():
    history = make_history(vocabulary=VOCABULARY | LAYER_VOCABULARY)
    shown = render(run=history).data("page")
    assert set(LAYER_VOCABULARY) <= set(shown["metrics"])
    assert shown["sources"][0]["variables"]["layer_nc1"]["dims"][-2:] == ["split", "layer"]
    for name, metric in LAYER_VOCABULARY.items():
        assert shown["metrics"][name]["title"] == metric.title
        assert shown["metrics"][name]["best"] == metric.best


def hostile_history():
    history = make_history(fields={"data.name": HOSTILE, "data.dir": HOSTILE})
    labels = [f"{HOSTILE} {i}" for i in range(history.sizes["label"])]
    return history.assign_coords(label=labels, other_label=labels)


def test_names_are_shown_and_never_executed():
    parsed = render(**{HOSTILE: hostile_history(), "\ud800\x1b": make_history()})
    assert [attrs.get("type") for attrs, _ in parsed.scripts] == ["application/json"] * 2 + [
        None
    ] * 2
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "iframe", "object", "embed")]
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    assert HOSTILE in "".join(parsed.words)
    source = parsed.data("page")["sources"][0]
    assert source["name"] == HOSTILE
    assert source["coordinates"]["label"][0] == f"{HOSTILE} 0"
    assert "49" not in "".join(word for word in parsed.words if "alert" in word)


def test_only_the_scripts_that_the_policy_names_may_run_and_nothing_is_fetched():
    parsed = render(run=make_history())
    (policy,) = (a["content"] for tag, a in parsed.tags if "http-equiv" in a)
    for _, script in parsed.scripts[2:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(";"))
    assert "unsafe" not in rules["script-src"]
    addresses = [a[key] for _, a in parsed.tags for key in ("src", "href") if key in a]
    assert addresses == ["data:,"]


def test_the_script_that_draws_is_the_published_one():
    # Of dist/echarts.min.js in echarts 6.1.0 on npm.
    published = "b66b25aeb4df84e33199dc21694014d336d222cbd9deb0e5a7c14bd6aa0d0fd0"
    found = hashlib.sha256(page._asset("echarts.min.js").encode()).hexdigest()
    assert found == published


def test_what_makes_the_page_too_large_is_left_out_and_named(monkeypatch):
    history = make_history(classes=9, seed=(0, 1, 2))
    monkeypatch.setattr(numbers, "MOST_CHARACTERS", 20_000)
    (source,) = render(run=history).data("page")["sources"]
    assert histories.COSINES in source["omitted"]
    assert {"nc1", "nc3", "accuracy"} <= set(source["variables"])
    assert set(source["omitted"]).isdisjoint(source["variables"])
    # What the page draws first is the last to be left out, however many numbers it has.
    monkeypatch.setattr(numbers, "MOST_CHARACTERS", 6_000)
    (source,) = render(run=history).data("page")["sources"]
    assert {"nc1", "nc2_equiangular_means", "nc3", "nc4", "accuracy"} <= set(source["variables"])
    assert source["omitted"]
    monkeypatch.setattr(numbers, "MOST_CHARACTERS", 20_000)
    packed = numbers.pack({"run": history})
    assert sum(map(len, packed.numbers[0].values())) <= 20_000


def test_configs_are_compared_field_by_field():
    fields = {"loss": "cross_entropy", "model.widths": (8, 8), "report.enabled": False}
    other = make_history(fields=fields)
    sources = [page.Source(n, h, {}) for n, h in (("a", make_history()), ("b", other))]
    found = page._differences(sources)
    assert found == {
        "loss": ["square", "cross_entropy"],
        "model.widths": ["128,128,128", "8,8"],
    }


def test_the_config_file_of_a_page_is_the_config():
    fields = {"loss": "cross_entropy", "sweep.seed": (4, 5), "data.name": HOSTILE}
    config = configuration.default_config()
    config.update(fields)
    namespace = {}
    exec(page._config_file(config), namespace)
    assert configuration.to_json(namespace["get_config"]()) == configuration.to_json(config)


def test_bounds_are_drawn_beside_what_they_bound():
    variables = {"nc1", "nc1_bound", "nc3", "nc3_floor", "nc3_bound", "nc4_bound"}
    variables |= {"etf_error", "nc2_bound_etf", "nc2_bound_equinorm", "nc2_equinorm_means"}
    variables |= {"nc4_bound_nc1", "nc4", "nc3_centered", "nc3_centered_bound", "fit_loss_floor"}
    found = {pair["measured"]: pair["predicted"] for pair in page._predictions(variables)}
    assert found == {
        "nc1": ["nc1_bound"],
        "nc3": ["nc3_bound", "nc3_floor"],
        "nc3_centered": ["nc3_centered_bound"],
        "nc4": ["nc4_bound", "nc4_bound_nc1"],
        "etf_error": ["nc2_bound_etf"],
        "nc2_equinorm_means": ["nc2_bound_equinorm"],
    }


def test_the_headline_says_how_far_training_is_and_where_collapse_is_most():
    history = make_history(epochs=(0, 1, 10), weight_decay=(0.0, 1e-3))
    history = changed(history, accuracy=1.0)
    history["nc3"][{"weight_decay": 1}] = 0.125
    history["nc3"][{"weight_decay": 0}] = 0.5
    lines = headline.sentences(history)
    assert "4 networks" in lines[0]
    assert "10 of 300" in lines[0]
    assert any(
        "NC3" in line and "lambda = 0.001: 0.125" in line and "4.0 times" in line for line in lines
    )
    assert "epoch 0 at lambda = 0, 0 at lambda = 0.001" in lines[1]
    lost = headline.sentences(diverge(history, seed=1))
    assert "2 diverged" in lost[0]


def test_what_holds_collapse_back_is_the_largest_other_share():
    history = make_history()
    shares = {"theorem": 1.25, "mean": 0.05, "asymmetry": 0.02, "within": -0.4, "gradient": 0.1}
    history = changed(history, **{f"budget_{term}": share for term, share in shares.items()})
    (line,) = headline._held_back(history)
    assert "125%" in line
    assert "within" in line
    assert "-40%" in line


def test_an_axis_of_names_is_an_axis_and_each_has_its_own_headline():
    one = make_history()
    history = varied.join([one, one], {"optimizer": ["sgd", HOSTILE]}, one.attrs["config"])
    parsed = render(run=history)
    (source,) = parsed.data("page")["sources"]
    assert [axis["name"] for axis in source["axes"]] == ["weight_decay", "optimizer", "seed"]
    assert source["axes"][1]["labels"] == ["sgd", HOSTILE]
    lines = headline.sentences(history)
    for name in ("sgd", HOSTILE):
        assert any(
            line.startswith(f"optimizer={name}: NC3 is least at lambda = ") for line in lines
        )


def test_a_monitored_model_has_its_layers_for_runs():
    parsed = render(run=monitor_history(), sweep=make_history())
    monitored_source = parsed.data("page")["sources"][0]
    assert monitored_source["axes"] == [{"name": "layer", "labels": ["body", "fc"]}]
    assert monitored_source["focus"] == 1
    lines = headline.sentences(monitor_history())
    assert any("fc" in line and "0.0417" in line and "0.25" in line for line in lines)
    assert lines[-1] == "a remark"


def test_the_command_writes_one_file_in_workdir_or_where_it_is_told(tmp_path, capsys):
    first, second = (tmp_path / name for name in "ab")
    for folder in (first, second):
        save(make_history(), folder)
    assert report.main([str(first)]) == 0
    assert (first / "report.html").stat().st_size < 6e6
    out = tmp_path / "new" / "both.html"
    assert report.main([str(first), str(second), str(first), "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(first / "report.html"), str(out)]
    assert [s["name"] for s in Parsed(out.read_text()).data("page")["sources"]] == ["a", "b"]
    sha256 = hashlib.sha256((first / "history.nc").read_bytes()).hexdigest()
    assert sha256 in (first / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["nowhere"], "history"),
        (["a", "nowhere"], "history"),
        (["a", "--out", "a"], "--out"),
        (["a", "--out", "a/history.nc"], "--out"),
        (["a", "--out", "folder.html"], "--out"),
        (["a", "--out", "a/history.nc/x.html"], "report"),
        (["a", "--out", "/proc/x.html"], "report"),
        (["a/history.nc"], "WORKDIR"),
        (["a", "--out", "~nobody_of_this_name/x.html"], "--out"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(words, field, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(make_history(), tmp_path / "a")
    before = (tmp_path / "a" / "history.nc").read_bytes()
    (tmp_path / "folder.html").mkdir()
    assert report.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {field}")
    assert (tmp_path / "a" / "history.nc").read_bytes() == before
    assert not list(tmp_path.glob("**/report.html"))

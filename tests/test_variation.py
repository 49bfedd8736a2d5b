"""Fields with several values: how they are read, what is refused, which variants there are."""

import itertools

import pytest

import ncjax
from ncjax import config as configuration
from ncjax import plan, variation
from ncjax.cli import train
from ncjax.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "rest", "varied"),
    [
        (["--config.train.optimizer=sgd"], 1, {}),
        (["--config.train.optimizer=sgd,adamw"], 0, {"train.optimizer": ["sgd", "adamw"]}),
        (["-config.train.optimizer=sgd,adamw"], 0, {"train.optimizer": ["sgd", "adamw"]}),
        (["--config.train.optimizer", "sgd,adamw"], 0, {"train.optimizer": ["sgd", "adamw"]}),
        (["--config.model.widths=8,8"], 1, {}),
        (["--config.model.widths=8,8;4"], 0, {"model.widths": ["8,8", "4"]}),
        (["--config.sweep.seed=0,1"], 1, {}),
        (["--config.data.dir=a,b", "--config.profile.dir=a,b"], 2, {}),
        (["--config.loss=square,", "--config.loss=square"], 1, {}),
        (["--config.loss=square", "--config.loss=square,cross_entropy"], 0, {"loss": 2}),
        (["--config.sweep.seed=0", "--config.sweep.seed", "5"], 1, {}),
        (["--workdir=a,b", "--processes=1,2"], 2, {}),
    ],
)
def test_fields_with_several_values_leave_the_command_line(arguments, rest, varied):
    left, found = variation.split_arguments(["ncjax", *arguments])
    assert len(left) == 1 + rest
    sizes = {name: len(texts) for name, texts in found.items()}
    assert found == varied or sizes == varied


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--config.sweep.seed=0", "--config.sweep.seed=5"], "sweep.seed", (5,)),
        (["--config.sweep.seed=0,1", "--config.sweep.seed=5,6"], "sweep.seed", (5, 6)),
        (["--config.model.widths=8,8", "--config.model.widths", "4"], "model.widths", (4,)),
        (["--config.train.epochs=2", "--config.train.epochs=3"], "train.epochs", 3),
        (["--config.loss=square,", "--config.loss=square"], "loss", "square"),
        (["--config.data.standardize", "--config.data.standardize=false"], "data.standardize", 0),
    ],
)
def test_of_a_field_that_stands_twice_the_last_counts(flags, field, value):
    arguments = train._parse(["ncjax", "--dry-run", *flags])
    config = configuration.validate(arguments.config)
    assert configuration.flatten(configuration.to_mapping(config))[field] == value
    assert not arguments.vary


def test_a_comma_in_the_name_of_a_file_that_exists_is_part_of_it(tmp_path):
    (tmp_path / "a,b.npz").write_bytes(b"")
    for name, count in (("a,b.npz", 0), ("a,c.npz", 2)):
        argument = f"--config.data.name={tmp_path}/{name}"
        _, varied = variation.split_arguments(["ncjax", argument])
        assert len(varied.get("data.name", ())) == count


def test_the_values_of_a_command_line_have_the_types_of_their_fields():
    flags = [
        "--config.train.batch_size=32,64",
        "--config.model.widths=8,8;4",
        "--config.loss=square",
    ]
    config, vary = train._load_varied("digits:smoke", ["ncjax", *flags])
    assert vary == {"train.batch_size": (32, 64), "model.widths": ((8, 8), (4,))}
    assert config.loss == "square"
    made = variation.make(vary)
    assert made.labels == {"widths": ["8-8", "4"], "batch_size": [32, 64]}


# A command line, the field it is refused for, and what the line says besides.
BAD = [
    (["--config.train.optimizer=sgd,sgdd"], "config.train.optimizer: got 'sgdd'", "sgd, adam,"),
    (["--config.train.optimizer=sgd,"], "config.train.optimizer: got ''", "sgd, adam,"),
    (["--config.train.optimizer=,"], "config.train.optimizer: got ''", "sgd, adam,"),
    (["--config.train.optimizer=sgd,sgd"], "config.train.optimizer: got 'sgd'", "twice"),
    (["--config.train.batch_size=8,08"], "config.train.batch_size: got 8", "twice"),
    (["--config.train.batch_size=8,x"], "config.train.batch_size: got 'x'", "integer"),
    (["--config.train.batch_size=8,9999"], "config.train.batch_size: got 9999", "batch_size=9999"),
    (["--config.model.widths=8;"], "config.model.widths: got ('',)", "integers"),
    (["--config.model.widths=8;8,0"], "config.model.widths: got (8, 0)", "integers"),
    (["--config.model.widths=8,8;8,8"], "config.model.widths: got (8, 8)", "twice"),
    (["--config.train.epochs=3,4"], "config.train.epochs: got '3,4'", "one value"),
    (["--config.log.epochs=1;2"], "config.log.epochs: got '1;2'", "one value"),
    (["--config.mesh.run=1,2"], "config.mesh.run: got '1,2'", "one value"),
    (["--config.checkpoint.keep=1,2"], "config.checkpoint.keep: got '1,2'", "one value"),
    (["--config.sweep.runs_per_program=1,2"], "config.sweep.runs_per_program", "one value"),
    (["--config.sweep.seed=0;1"], "config.sweep.seed: got '0;1'", "commas"),
    (["--config.decay.head=0;1"], "config.decay.head: got '0;1'", "commas"),
    (
        ["--config.train.optimzer=sgd,adam"],
        "config.train.optimzer",
        "did you mean config.train.optimizer",
    ),
    (
        ["--config.train.optimizer=sgd,adam", "--config.train.decay=decoupled"],
        "config.train.decay",
        "optimizer=adam)",
    ),
    (
        ["--config.train.optimizer=sgd,adamw", "--config.train.decay=coupled,decoupled"],
        "optimizer=adamw, decay=decoupled",
        "optimizer=adamw, decay=coupled;",
    ),
    (
        ["--config.loss=square,cross_entropy", "--config.targets=centered"],
        "config.targets",
        "loss_function=cross_entropy)",
    ),
]


@pytest.mark.parametrize(
    ("flags", "field", "hint"), BAD, ids=[" ".join(flags) for flags, _, _ in BAD]
)
def test_bad_values_of_any_variant_come_first_in_one_line(flags, field, hint, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train.main(["ncjax", f"--workdir={workdir}", *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert field in message
    assert hint in message
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("vary", "field"),
    [
        ({"train.optimizer": "sgd"}, "config.train.optimizer"),
        ({"train.optimizer": ()}, "config.train.optimizer"),
        ({"model.widths": (8, 8)}, "config.model.widths"),
        ({"train.optimiser": ("sgd",)}, "config.train.optimiser"),
        ({"data.name": ("digits", "synthetic")}, "vary"),
        ({"sweep.seed": ((0,), (1,))}, "config.sweep.seed"),
    ],
)
def test_python_is_refused_what_a_command_line_is(vary, field, tmp_path, without_type_checks):
    given = ncjax.Dataset.from_arrays([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1], name="mine")
    with pytest.raises(InputError, match=rf"^{field}: "):
        plan.prepare_varied(ncjax.Config(), vary, tmp_path / "run", given)
    assert not (tmp_path / "run").exists()


def test_every_field_that_may_vary_has_a_dimension_of_its_own_and_no_metric_has_its_name():
    from ncjax.config import AXES, SCHEMA
    from ncjax.metrics.vocabulary import VOCABULARY

    fields = []
    for name in SCHEMA:
        try:
            variation.check_varied(name, "")
        except InputError:
            continue
        fields.append(name)
    dimensions = [variation.dimension_of(name) for name in fields]
    assert {"train.optimizer", "train.decay", "loss", "targets", "model.widths"} <= set(fields)
    assert {"train.batch_size", "model.normalization", "data.per_class"} <= set(fields)
    assert len(set(dimensions)) == len(dimensions)
    of_histories = {*VOCABULARY, *AXES, "epoch", "split", "layer", "mode", "label", "other_label"}
    # `load_run` takes the others by name.
    assert of_histories.isdisjoint(dimensions)
    assert {"workdir", "epoch", "dataset"}.isdisjoint(dimensions)


def test_variants_are_the_product_in_the_order_of_the_schema():
    vary = {"train.optimizer": ("sgd", "adam"), "model.widths": ((8, 8), (4,))}
    made = variation.make(vary)
    config = ncjax.Config()
    variants = variation.make_variants(config, made)
    expected = list(itertools.product(("8-8", "4"), ("sgd", "adam")))
    assert [tuple(variant.labels.values()) for variant in variants] == expected
    assert [variant.config.model.widths for variant in variants] == [(8, 8), (8, 8), (4,), (4,)]
    assert [variant.config.train.optimizer for variant in variants] == ["sgd", "adam"] * 2
    assert variants[1].folder == "widths=8-8,optimizer=adam"
    assert config == ncjax.Config()


def test_folders_of_other_values_are_others_and_have_no_signs_that_paths_lack():
    labels = ["a/b", "a_b", "a?b", "a[b]", "m:N", "ä", "x" * 300, "x" * 299 + "y", "..", "a b"]
    folders = [variation.folder_of({"data_name": label}) for label in labels]
    assert len(set(folders)) == len(labels)
    assert all(len(folder) < 100 and not set(folder) & set("/?[]:# %\\") for folder in folders)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"widths": "8-8", "batch_size": 32}, ("8-8", 32)),
        ({"widths": (8, 8), "batch_size": 64.0}, ("8-8", 64)),
        ({"widths": 4.0, "batch_size": "64", "seed": 1}, ("4", 64)),
        ({"widths": "8-8"}, None),
        ({"widths": "8-9", "batch_size": 32}, None),
    ],
)
def test_a_variant_is_found_by_its_labels_or_by_its_values(asked, found):
    made = variation.make({"model.widths": ((8, 8), (4,)), "train.batch_size": (32, 64)})
    if found is None:
        with pytest.raises(InputError):
            made.find(asked)
    else:
        assert tuple(made.find(asked).values()) == found


def test_what_config_json_says_is_read_again():
    import json

    made = variation.make({"model.widths": ((8, 8), (4,)), "data.standardize": (True, False)})
    text = json.dumps(variation.to_stored(ncjax.Config(), made))
    assert variation.from_stored(json.loads(text)) == made
    assert variation.from_stored(json.loads(configuration.to_json(ncjax.Config()))) is None


@pytest.mark.parametrize(
    ("held", "asked", "grows"),
    [
        ({"loss": ("square",)}, {"loss": ("cross_entropy", "square")}, True),
        ({"loss": ("square", "cross_entropy")}, {"loss": ("square",)}, False),
        ({"loss": ("square",)}, {"targets": ("one_hot",)}, False),
        ({"loss": ("square",)}, {"loss": ("square",), "targets": ("one_hot",)}, False),
        (None, {"loss": ("square",)}, False),
        ({"loss": ("square",)}, None, False),
    ],
)
def test_a_workdir_takes_more_values_of_the_same_fields_alone(held, asked, grows, tmp_path):
    config = ncjax.Config()
    stored = variation.to_stored(config, variation.make(held)) if held else None
    text = configuration.to_json(config)
    if stored:
        import json

        text = json.dumps(stored)
    (tmp_path / "config.json").write_text(text)

    def examine():
        if asked:
            return plan.examine_varied(config, asked, tmp_path).variation.values
        return plan.examine(config, tmp_path)

    if grows:
        assert examine() == asked
    else:
        with pytest.raises(InputError, match=r"^--workdir: .*another WORKDIR$"):
            examine()

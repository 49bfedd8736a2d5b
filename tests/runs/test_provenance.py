"""provenance: what decides bits is there by name, and a difference is said with both values."""

from importlib import metadata

import jax
import pytest

import ncjax
from ncjax.runs import provenance
from ncjax.training import parallel


def test_everything_that_decides_bits_is_there_as_text():
    found = provenance.arithmetic(parallel.make_mesh(2), runs=2)
    names = {
        "ncjax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "numpy",
        "XLA_FLAGS",
        "platform",
        "device",
        "mesh",
    }
    assert names <= found.keys()
    assert {"python", "orbax-checkpoint"} <= provenance.versions().keys() - found.keys()
    assert all(isinstance(value, str) for value in found.values())
    assert found["jax"] == jax.__version__


def test_a_checkout_that_is_not_installed_has_a_version(monkeypatch):
    def of_others(package):
        if package == "ncjax":
            raise metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(metadata, "version", of_others)
    assert provenance.versions()["ncjax"] == ncjax.__version__


def test_meshes_and_runs_differ():
    two, one = parallel.make_mesh(4, run=2), parallel.make_mesh(4, run=1)
    changed = provenance.differences(
        provenance.arithmetic(one, runs=4), provenance.arithmetic(two, runs=2)
    )
    assert changed == [
        "mesh is '1 x 1' here and '2 x 1' there",
        "runs at once is '4' here and '2' there",
    ]


def test_the_random_bits_are_those_of_the_settings():
    before = provenance.random_bits()
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
        assert len(provenance.differences(provenance.random_bits(), before)) == 1
    with jax.default_prng_impl("rbg"):
        assert provenance.random_bits()["jax_default_prng_impl"] == "rbg"


def test_the_environment_counts(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    assert provenance.software()["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"
    monkeypatch.delenv("XLA_FLAGS")
    assert provenance.software()["XLA_FLAGS"] == ""


@pytest.mark.parametrize("theirs", [{}, {"jax": "1"}, {"jax": "1", "gone": "2"}])
def test_what_only_one_side_knows_is_no_difference(theirs):
    assert provenance.differences({"jax": "1", "younger": "3"}, theirs) == []


def test_a_processor_without_a_description_is_still_named(monkeypatch):
    def missing(_):
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    assert provenance.processor()

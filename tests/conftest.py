"""Strict numerics for every test, and the fixtures that several test files share."""

import os
import shutil

# Before JAX is imported: sharding is tested on two simulated devices.
os.environ["JAX_NUM_CPU_DEVICES"] = "2"

from pathlib import Path

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Annotations are checked at run time. A test file must not import ncjax before this line runs, and
# none can: pytest imports conftest first.
install_import_hook("ncjax", "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """Decoded data sets are cached in a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tfds_dir() -> str:
    """Where MNIST and CIFAR-10 lie prepared by TFDS; skips where they do not."""
    folder = Path(os.environ.get("TFDS_DATA_DIR") or ROOT.parent / "shared" / "data" / "tfds")
    if not (folder / "mnist").is_dir() or not (folder / "cifar10").is_dir():
        pytest.skip(f"no prepared MNIST and CIFAR-10 in {folder}; set TFDS_DATA_DIR")
    return str(folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """WORKDIR of a tiny sweep with checkpoints at epochs 4 and 6; not to be changed: see
    `copied`.
    """
    from ncjax import plan
    from ncjax.config import default_config
    from ncjax.runs import loop

    config = default_config()
    config.data.name, config.data.num_classes, config.data.per_class = "synthetic", 3, 20
    config.model.widths, config.model.head_bias = (8, 8), "free"
    config.train.epochs, config.train.batch_size, config.checkpoint.every = 6, 16, 2
    config.sweep.weight_decay, config.sweep.seed = (0.0, 1e-3), (0, 1)
    workdir = tmp_path_factory.mktemp("trained")
    loop.train(plan.prepare(config, workdir))
    return workdir


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture
def float64():
    """JAX computes in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def uncached():
    """JAX as it is by default, without a cache of compiled programs."""
    defaults = {
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 1.0,
    }
    before = {name: getattr(jax.config, name) for name in defaults}
    for name, value in defaults.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def fresh_metrics():
    """No program of metrics is kept from another test, nor for one."""
    from ncjax.training import program

    program._make_metrics.cache_clear()
    yield
    program._make_metrics.cache_clear()


@pytest.fixture
def without_type_checks():
    """Turns off the checks of argument types that only tests have: what users see remains."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)

"""Eight fake CPU devices for every test, and strict numerics; set before any backend starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import fresh
import jax
import pytest
from absl import flags

# Most of the tests' time is compiling, and many programs are the same in several tests and processes.
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", Path(__file__).parent.parent / ".pytest_cache" / "xla")
# JAX writes into it without a lock: tests that run at the same time (pytest -n) each have their own.
CACHE = Path(CACHE) / os.environ.get("PYTEST_XDIST_WORKER", "")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which no app has parsed here


def pytest_report_header() -> str:
    return f"VIXML_TEST_SEED={fresh.SESSION}"


@pytest.fixture
def one_device():
    """Hides all devices but the first."""
    import tiny

    with tiny.only_devices(1):
        yield


@pytest.fixture
def single_mesh():
    """A mesh of one device, entered."""
    from vixml_jax import sharding

    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def browser():
    """A Chromium (`apt install chromium`, extra `dev`); tests that need one are skipped without."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=lambda sizes: "x".join(map(str, sizes)))
def mesh(request):
    """Each of three meshes over eight devices, entered."""
    from vixml_jax import sharding

    with sharding.use(sharding.make_mesh(*request.param)) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A directory with a finished run with pictures (run), its raw folder and dataset; not to be changed."""
    import tiny

    from vixml_jax.prepare import prepare
    from vixml_jax.train import train

    root = tmp_path_factory.mktemp("tiny_run")
    prepare(tiny.write_raw(root / "raw", seed=1), root / "dataset", "tiny")
    config = tiny.config(root / "dataset", images=2)
    config.retrieval.query_weight = 0.2
    with tiny.only_devices(1):
        train(config, root / "run")
    return root

"""Settings for the whole suite: threads, no network, the `cuda` marker, hypothesis, a umask."""

import gc
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.forking import run

if TYPE_CHECKING:
    from tests.server.process import Forks

# A test that tries to download a model fails immediately with a clear error.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# No deadline, as a test may be slow on a loaded machine; CI runs the same examples each time.
settings.register_profile("weft", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("weft")

# Imports create many objects, which the garbage collector would traverse again and again.
gc.disable()


TESTS = Path(__file__).parent
LONGEST = (
    "server/http/predictions/test_predictions.py",
    "server/test_cli.py",
    "server/http/test_live_page.py",
    "server/http/test_page.py",
    "samplers/test_model_statistics.py",
    "samplers/test_convergence.py",
    "embedded/test_distil.py",
    "samplers/test_contract.py",
    "server/engine/test_engine.py",
    "server/engine/test_classify.py",
    "server/http/test_gate.py",
    "server/fitting/test_model_statistics.py",
    "server/models/test_hub.py",
    "server/test_plugin_files.py",
    "test_plugins.py",
    "server/models/adapters/test_against_diffusers.py",
    "samplers/test_leading_errors.py",
    "studies/test_guidance_study.py",
    "test_distribution.py",
    "samplers/test_dpm_solver_v3.py",
    "server/http/native/test_generate.py",
    "server/models/test_loading.py",
    "samplers/test_against_diffusers.py",
    "server/models/compiling/test_compiled_images.py",
)
"""Files that take at least eight seconds, the longest first. They run before all others, so that no
process starts a long one when everything else is done."""

COMPANY = {
    TESTS / name: shared
    for shared, names in {
        "forks": (
            "benchmarks/test_promises.py",
            "server/http/predictions/test_predictions.py",
            "server/http/test_drain.py",
            "server/models/test_libraries.py",
            "server/test_cli.py",
            "server/test_lost_device.py",
        ),
        "browser": ("server/http/test_live_page.py", "server/http/test_page.py"),
    }.items()
    for name in names
}
"""Files that run in one process, as they share something that takes seconds to start."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--processes", type=int, default=1, help="processes that share the test files")


def pytest_configure(config: pytest.Config) -> None:
    """Set what torch reads when it is imported, which no test module has done yet."""
    if config.option.processes > 1:
        # With small models, many threads spend their time waiting for one another, and so do
        # processes that share the cores.
        os.environ["OMP_NUM_THREADS"] = "1"
        # A process that has initialized CUDA cannot fork others that use it. With this, torch asks
        # the driver's library whether there is a device.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Give each process one file at a time, or all files of a company."""
    options = session.config.option
    if options.processes == 1 or session.testsfailed or options.collectonly:
        return None
    groups: defaultdict[str | Path, list[pytest.Item]] = defaultdict(list)
    for item in session.items:
        groups[COMPANY.get(item.path, item.path)].append(item)
    run(session, [*groups.values()], options.processes)
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and skip tests that need a CUDA device where there is none."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    needy = [item for item in items if item.get_closest_marker("cuda")]
    if not needy:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needy:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Enable garbage collection, but not of imported objects, which live until the end."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def forks() -> "Iterator[Forks]":
    """Starts processes that have already imported what a server imports."""
    from tests.server.process import Forks

    made = Forks()
    yield made
    made.close()


@pytest.fixture
def mode_of_files() -> Iterator[int]:
    """Set an unusual umask; gives the resulting mode of new files."""
    before = os.umask(0o027)
    yield 0o640
    os.umask(before)

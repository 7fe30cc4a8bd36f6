"""Options of the whole suite: threads, no network, the `cuda` marker, hypothesis, a umask."""

import fcntl
import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Read when torch is imported, which no test module has done yet. Small models on many threads
# spend their time waiting for one another, and so do processes that share the cores. A worker of
# xdist inherits what this file has set in the process that started it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
# A test that would fetch a model fails at once and says so.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A machine under load is slow without being wrong; CI runs the same examples each time.
settings.register_profile("weft", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("weft")

# The objects that imports make are many, and the collector would go through them again and again.
gc.disable()


TESTS = Path(__file__).parent
LONGEST = (
    "samplers/test_convergence.py",
    "server/engine/test_engine.py",
    "samplers/test_against_diffusers.py",
    "studies/test_guidance_study.py",
    "server/http/predictions/test_predictions.py",
    "test_plugins.py",
    "server/http/native/test_generate.py",
    "server/http/test_live_page.py",
    "server/http/test_page.py",
    "server/test_cli.py",
    "server/http/live/test_live_stream.py",
    "server/http/test_readme_requests.py",
    "samplers/test_model_statistics.py",
)
"""Files that take ten seconds and more, the longest first. They go before all others, so that no
process begins one when all else is done."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect in one process at a time.

    In a fresh environment the first compiles what it imports, which takes longer than to import
    it, and the others find that done; meanwhile pyright has their processors.
    """
    folder = os.open(TESTS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        return (yield)
    finally:
        os.close(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and skip what needs a CUDA device where there is none."""
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
    """Begin to collect cycles, but not among what was imported, which stays to the end."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def mode_of_files() -> Iterator[int]:
    """An umask that is not the usual one, and the mode that it leaves to new files."""
    before = os.umask(0o027)
    yield 0o640
    os.umask(before)

"""Memory of the host, as far as a container or a service may use it."""

from pathlib import Path

import psutil
import pytest
import torch

from server.models import memory
from server.models.memory import HOST, attainable_bytes, measure, reclaim
from server.models.own_memory import copy_to_own_memory

LIMIT, USED = 2**20, 2**19


@pytest.mark.parametrize(
    ("names", "group", "folder", "statistics", "kept"),
    [
        (memory.USAGE, "0::/", "", "anon 5\ninactive_file 1000\nactive_file 200000\n", 201_000),
        (memory.USAGE, "0::/system.slice/weft.service\n", "system.slice/weft.service", "", 0),
        (memory.USAGE, "0::/a/of/the/host", "", "", 0),
        (
            memory.USAGE_OF_VERSION_1,
            "9:name=systemd:/\n8:memory:/docker/1\n",
            "",
            "inactive_file 1\ntotal_inactive_file 300\ntotal_active_file 20\n",
            320,
        ),
    ],
    ids=["container", "service", "container that sees the host's name", "version 1"],
)
def test_there_is_what_is_below_the_limit_and_what_the_kernel_keeps_of_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...],
    group: str,
    folder: str,
    statistics: str,
    kept: int,
) -> None:
    files = [tmp_path / folder / name for name in names]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, content in zip(files, (f"{LIMIT}\n", f"{USED}\n", statistics), strict=True):
        file.write_text(content)
    (tmp_path / "own").write_text(group)
    monkeypatch.setattr(memory, "GROUPS", str(tmp_path))
    monkeypatch.setattr(memory, "OWN_GROUP", str(tmp_path / "own"))
    assert measure(torch.device("cpu")) == (LIMIT - USED + kept, LIMIT)
    files[0].write_text("max\n")
    assert measure(torch.device("cpu")).total == psutil.virtual_memory().total


def test_what_the_neighbours_in_a_larger_group_use_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a pod of Kubernetes with several containers, or a slice of systemd."""
    for folder, limit, used in (("slice", 3 * LIMIT, 2.75 * LIMIT), ("slice/weft", LIMIT, USED)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.current").write_text(f"{int(used)}\n")
    (tmp_path / "own").write_text("0::/slice/weft\n")
    monkeypatch.setattr(memory, "GROUPS", str(tmp_path))
    monkeypatch.setattr(memory, "OWN_GROUP", str(tmp_path / "own"))
    assert measure(torch.device(HOST)) == (LIMIT // 4, LIMIT)


def segment(total: int, allocated: int, *, device: int = 0, pool: int = 0) -> dict[str, object]:
    """An entry of torch's snapshot."""
    sizes = {"total_size": total, "allocated_size": allocated}
    return {**sizes, "device": device, "segment_pool_id": (0, pool)}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU of 1000 bytes, of which 460 are free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (460, 1000))
    segments = [segment(300, 250), segment(40, 10, pool=1), segment(70, 10, device=1)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 340)
    return torch.device("cuda", 0)


def test_a_tenth_of_a_gpu_is_left_to_activations(gpu: torch.device) -> None:
    # Memory of freed tensors that torch keeps counts as free, except in the pools of CUDA graphs.
    assert measure(gpu) == (460 + 50 - 100, 900)


def test_memory_of_cuda_graphs_can_be_had_for_weights(gpu: torch.device) -> None:
    assert attainable_bytes(gpu) == 460 + 300 + 40 - 100


def test_the_weights_of_an_unloaded_network_are_free_for_others(young_garbage: None) -> None:
    """The allocator keeps freed blocks that lie below others still in use."""
    device, process = torch.device(HOST), psutil.Process()
    others: list[torch.Tensor] = []
    before = process.memory_info().rss
    for _ in range(2):
        network = torch.nn.ParameterList([torch.zeros(2**18) for _ in range(48)])
        copy_to_own_memory(network, device)
        others.append(torch.ones(2**18))
        del network
        reclaim(device)
    assert process.memory_info().rss - before < 24 * 2**20

"""Memory of the host, as far as a container or a service may use it."""

from pathlib import Path

import psutil
import pytest
import torch

from server.models import memory
from server.models.memory import HOST, measure, reclaim
from server.models.own_memory import give_own_memory

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


def test_a_tenth_of_a_gpu_is_left_to_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    # Memory of freed tensors that torch keeps counts as free.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (500, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 250)
    assert measure(torch.device("cuda")) == (500 + 50 - 100, 900)


def test_the_weights_of_an_unloaded_network_are_free_for_others(young_garbage: None) -> None:
    """The allocator keeps freed blocks that lie below others still in use."""
    device, process = torch.device(HOST), psutil.Process()
    others: list[torch.Tensor] = []
    before = process.memory_info().rss
    for _ in range(2):
        network = torch.nn.ParameterList([torch.zeros(2**18) for _ in range(48)])
        give_own_memory(network, device)
        others.append(torch.ones(2**18))
        del network
        reclaim(device)
    assert process.memory_info().rss - before < 24 * 2**20

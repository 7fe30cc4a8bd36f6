"""Memory of the host, as far as a container may have it."""

from pathlib import Path

import psutil
import pytest
import torch

from server.models import memory
from server.models.memory import measure

MOST, USED = 2**20, 2**19


@pytest.mark.parametrize(
    ("statistics", "kept"),
    [
        ("anon 5\ninactive_file 1000\nactive_file 200000\nfile 7\n", 201_000),
        ("cache 9\ninactive_file 1\ntotal_inactive_file 300\ntotal_active_file 20\n", 320),
        ("", 0),
    ],
)
def test_a_container_has_what_is_below_its_limit_and_what_the_kernel_keeps_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistics: str, kept: int
) -> None:
    files = [tmp_path / name for name in ("limit", "used", "statistics")]
    for file, content in zip(files, (f"{MOST}\n", f"{USED}\n", statistics), strict=True):
        file.write_text(content)
    monkeypatch.setattr(memory, "CGROUPS", (tuple(map(str, files)),))
    assert measure(torch.device("cpu")) == (MOST - USED + kept, MOST)
    files[0].write_text("max\n")
    assert measure(torch.device("cpu")).most == psutil.virtual_memory().total

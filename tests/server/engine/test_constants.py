"""Tensors that a recording reads and must keep alive are found while it is made."""

from __future__ import annotations

import torch

from server.engine.constants import Constants


@torch.inference_mode()
def test_what_is_read_and_not_made_is_kept() -> None:
    x, weight, kept, unread = (torch.rand(4, 4) for _ in range(4))
    with Constants() as seen:
        made = (x @ weight.T).relu_()
        made.add_(torch.cat([kept[:2], kept[2:]]))
        (made.view(16) * torch.arange(16)).sum()
    found = {one.untyped_storage().data_ptr() for one in seen.tensors}
    assert found == {one.data_ptr() for one in (x, weight, kept)}
    assert unread.data_ptr() not in found

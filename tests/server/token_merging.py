"""Negative token merging as an attention processor of diffusers, over a whole batch."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F


class Apart:
    """Negative token merging after plain attention, over a whole batch, as in the paper.

    O_i <- (1 + a) O_i - a O_ref[j*], j* = argmax_j cos(O_i, O_ref,j), where that cosine is above
    the threshold; the reference is the batch's first image.
    """

    def __init__(self, strength, threshold):
        self.strength, self.threshold, self.moved = strength, threshold, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            part.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(told), attn.to_v(told))
        )
        out = attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        unit = out / out.norm(dim=-1, keepdim=True)
        cosines = torch.einsum("bif,jf->bij", unit, unit[0])
        best, where = cosines.max(2)
        alike = best > self.threshold
        alike[0] = False
        self.moved.append(float(alike[1:].float().mean()))
        away = (1 + self.strength) * out - self.strength * out[0][where]
        return torch.where(alike[..., None], away, out)


def kept_apart(network, layers, strength, threshold):
    changed, merging = copy.deepcopy(network), Apart(strength, threshold)
    for layer in layers:
        for attention in ("attn1", "attn2"):
            changed.get_submodule(f"{layer}.{attention}").set_processor(merging)
    return changed, merging

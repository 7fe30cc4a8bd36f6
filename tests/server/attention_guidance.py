"""Normalized attention guidance as an attention processor of diffusers, over a whole batch."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F


class AgainstText:
    """The paper's guidance on plain cross-attention, for prompts followed by negative prompts."""

    def __init__(self, scale, tau, alpha):
        self.scale, self.tau, self.alpha, self.shortened = scale, tau, alpha, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        rows = len(hidden_states)
        assert encoder_hidden_states is not None
        assert len(encoder_hidden_states) == 2 * rows
        q, k, v = (
            part.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for part in (
                attn.to_q(hidden_states).repeat(2, 1, 1),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        both = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        plus, minus = both.chunk(2)
        extrapolated = self.scale * plus - (self.scale - 1) * minus
        ratio = extrapolated.norm(p=1, dim=-1, keepdim=True) / plus.norm(p=1, dim=-1, keepdim=True)
        self.shortened.append(float((ratio > self.tau).float().mean()))
        normalized = extrapolated * ratio.clamp(max=self.tau) / ratio
        return attn.to_out[0](self.alpha * normalized + (1 - self.alpha) * plus)


def guided_attention(network, scale, tau, alpha):
    """The network with all cross-attentions changed, for texts ``[2 rows, tokens, features]``."""
    changed, processor = copy.deepcopy(network), AgainstText(scale, tau, alpha)
    for name, module in changed.named_modules():
        if name.endswith(".attn2"):
            module.set_processor(processor)
    return changed, processor


@torch.no_grad()
def predicted(network, x, t, told, against):
    """The network's output for rows that are all guided away from their negative prompts."""
    return network(x, t, torch.cat([told, against]), return_dict=False)[0]

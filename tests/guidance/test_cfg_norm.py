"""CFG norm compared with the code of Qwen-Image's pipeline and of ComfyUI."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from guidance import CFGNorm

SHAPE = (3, 16, 6, 4)


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, COND, GUIDED = drawn(0), drawn(1), 3 * drawn(2)
SIGMA = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64).view(-1, 1, 1, 1)
FLOW = 1 - SIGMA, SIGMA


def packed(latents: Tensor, patch: int) -> Tensor:
    """Tokens ``[rows, tokens, features]`` as Qwen-Image's pipeline packs them."""
    rows, channels, height, width = latents.shape
    cells = latents.view(rows, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * patch**2)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_velocity_has_the_length_of_the_prompts_in_every_token(patch: Literal[1, 2]) -> None:
    ours = CFGNorm(patch=patch).rescale(GUIDED, COND, X, *FLOW, strength=1.0)
    comb, cond = (packed((X - D) / SIGMA, patch) for D in (GUIDED, COND))
    norms = [torch.norm(one, dim=-1, keepdim=True) for one in (cond, comb)]
    torch.testing.assert_close(packed((X - ours) / SIGMA, patch), comb * (norms[0] / norms[1]))


def test_models_that_preserve_variance_go_through_their_own_velocity() -> None:
    alpha = (1 - SIGMA.square()).sqrt()
    ours = CFGNorm().rescale(GUIDED, COND, X, alpha, SIGMA, strength=1.0)
    v, v_c, v_ours = ((alpha * X - D) / SIGMA for D in (GUIDED, COND, ours))
    expected = v * torch.norm(v_c, dim=1, keepdim=True) / torch.norm(v, dim=1, keepdim=True)
    torch.testing.assert_close(v_ours, expected)


def test_strength_blends_velocities_from_plain_guidance_to_the_full_rescale() -> None:
    strengths = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64).view(-1, 1, 1, 1)
    ours = CFGNorm().rescale(GUIDED, COND, X, *FLOW, strength=strengths)
    full = CFGNorm().rescale(GUIDED, COND, X, *FLOW, strength=1.0)
    torch.testing.assert_close(ours, torch.lerp(GUIDED, full, strengths))


def test_the_denoised_variant_is_the_node_of_comfyui() -> None:
    short = torch.cat([GUIDED[:2], 0.1 * GUIDED[2:]])
    ours = CFGNorm(variant="denoised").rescale(short, COND, X, *FLOW, strength=0.8)
    norm_full_cond = torch.norm(COND, dim=1, keepdim=True)
    norm_pred_text = torch.norm(short, dim=1, keepdim=True)
    scale = (norm_full_cond / (norm_pred_text + 1e-8)).clamp(min=0.0, max=1.0)
    assert (scale == 1).any(), "the case should see a token that is left alone"
    torch.testing.assert_close(ours, short * scale * 0.8)


def test_a_picture_as_a_whole_has_no_patches() -> None:
    with pytest.raises(ValidationError, match="patch is 2 and variant 'picture', which takes"):
        CFGNorm(variant="picture", patch=2)


@pytest.mark.parametrize("variant", ["velocity", "denoised", "picture"])
def test_what_was_not_guided_stays_as_it_is(variant: str) -> None:
    norm = CFGNorm.model_validate({"variant": variant})
    torch.testing.assert_close(norm.rescale(COND, COND, X, *FLOW, strength=1.0), COND)


def test_a_token_without_length_stays_and_tokens_may_be_cut_by_the_border() -> None:
    still = X.clone()
    still[:, :, 0, 0] = GUIDED[:, :, 0, 0]
    ours = CFGNorm().rescale(GUIDED, COND, still, *FLOW, strength=1.0)
    assert torch.equal(ours[:, :, 0, 0], GUIDED[:, :, 0, 0])
    whole = CFGNorm(patch=2).rescale(GUIDED, COND, X, *FLOW, strength=1.0)
    guided, cond, x = (one[..., :3] for one in (GUIDED, COND, X))
    cut = CFGNorm(patch=2).rescale(guided, cond, x, *FLOW, strength=1.0)
    torch.testing.assert_close(cut[..., :2], whole[..., :2])
    guided, cond, x = (one[..., 2:] for one in (guided, cond, x))
    alone = CFGNorm(patch=2).rescale(guided, cond, x, *FLOW, strength=1.0)
    torch.testing.assert_close(cut[..., 2:], alone)

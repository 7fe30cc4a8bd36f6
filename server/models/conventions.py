"""Conventions by name: how published models are sampled where the server's defaults do not suit.

Each is the sampler, spacing, number of steps and guidance that the authors of a kind of models
intended, most of them by distilling the models to few steps. ``docs/families.md`` has the same
table, and a test checks that both agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from guidance import CFG, Always, CFGNorm, CFGRescale, Policy, Rule, Unguided
from guidance.embedded import Embedded
from samplers import (
    DDIM,
    LCM,
    TCD,
    Angles,
    Custom,
    DPMSolverPP,
    Euler,
    EulerAncestral,
    LCMSpacing,
    Linspace,
    PredictionType,
    Sampler,
    Spacing,
    Trailing,
)
from server.models.defaults import ModelDefaults

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CONVENTIONS", "Convention", "defaults_by", "numbers"]

NONE: Final = Unguided()
EVALUATED: Final = Always()


@dataclass(frozen=True, slots=True)
class Convention:
    """How a kind of model is sampled.

    Attributes:
        models: description of these models for the reader.
        source: paper or model card.
        sampler: default sampler.
        spacing: default spacing of its steps.
        steps: default number of steps.
        counts: numbers of steps that they are distilled for; empty for any number.
        rule: default guidance rule.
        policy: default guidance policy.
        cfg_norm: default norm rescaling of guidance; None for none.
        weights_of_counts: whether each of these numbers has its own weights.
        one_step: sampler and spacing of the weights for one step, where they differ.
        one_step_prediction: prediction type of the weights for one step, where it differs.
        flow: whether they are flow-matching models.
    """

    models: str
    source: str
    sampler: Sampler
    spacing: Spacing
    steps: int
    counts: tuple[int, ...] = ()
    rule: Rule = NONE
    policy: Policy = EVALUATED
    cfg_norm: CFGNorm | None = None
    weights_of_counts: bool = False
    one_step: tuple[Sampler, Spacing] | None = None
    one_step_prediction: PredictionType | None = None
    flow: bool = False


CONVENTIONS: Final[Mapping[str, Convention]] = MappingProxyType(
    {
        "lcm": Convention(
            "latent consistency models with a guidance scale as an input, and their LoRAs",
            "arXiv 2310.04378; diffusers' `LatentConsistencyModelPipeline`",
            LCM(),
            LCMSpacing(),
            steps=4,
            counts=(1, 2, 3, 4, 5, 6, 7, 8),
            rule=CFG(scale=8.5),
            policy=Embedded(),
        ),
        "lcm_lora": Convention(
            "latent consistency models without such an input, and models with a fused LCM LoRA",
            "arXiv 2311.05556",
            LCM(),
            LCMSpacing(),
            steps=4,
            counts=(1, 2, 3, 4, 5, 6, 7, 8),
        ),
        "tcd": Convention(
            "trajectory consistency models",
            "arXiv 2402.19159, and its model card",
            TCD(gamma=0.3),
            LCMSpacing(),
            steps=4,
        ),
        "dmd2": Convention(
            "DMD2 of Stable Diffusion XL, and f-distill (2502.15681)",
            "arXiv 2405.14867; one step at timestep 399, as its code",
            LCM(),
            Trailing(),
            steps=4,
            counts=(1, 4),
            weights_of_counts=True,
            one_step=(LCM(), Custom(times=(399,))),
        ),
        "one_step": Convention(
            "SwiftBrush, and DMD2 and f-distill of Stable Diffusion 1.5",
            "arXiv 2312.05239, 2405.14867, 2502.15681: one evaluation at the noisiest timestep",
            LCM(),
            Trailing(),
            steps=1,
            counts=(1,),
        ),
        "sdxl_turbo": Convention(
            "SDXL Turbo",
            "arXiv 2311.17042; its scheduler's config",
            EulerAncestral(),
            Trailing(),
            steps=4,
            counts=(1, 2, 3, 4),
        ),
        "sd_turbo": Convention(
            "SD Turbo",
            "arXiv 2311.17042; its scheduler's config",
            Euler(),
            Trailing(),
            steps=4,
            counts=(1, 2, 3, 4),
        ),
        "lightning": Convention(
            "SDXL-Lightning",
            "arXiv 2402.13929, and its model card; one step predicts the picture",
            Euler(),
            Trailing(),
            steps=4,
            counts=(1, 2, 4, 8),
            weights_of_counts=True,
            one_step_prediction="sample",
        ),
        "hyper": Convention(
            "Hyper-SD, weights for one number of steps",
            "arXiv 2404.13686, and its model card; one step at timestep 800",
            DDIM(),
            Trailing(),
            steps=4,
            counts=(1, 2, 4, 8),
            weights_of_counts=True,
            one_step=(LCM(), Custom(times=(800,))),
        ),
        "hyper_unified": Convention(
            "Hyper-SD, weights for any number of steps",
            "arXiv 2404.13686, and its model card",
            TCD(gamma=1.0),
            LCMSpacing(),
            steps=4,
            counts=(1, 2, 3, 4, 5, 6, 7, 8),
        ),
        "pixart": Convention(
            "PixArt-alpha and PixArt-Sigma",
            "diffusers' `PixArtAlphaPipeline` and `PixArtSigmaPipeline`",
            DPMSolverPP(),
            Linspace(endpoint=False),
            steps=20,
            rule=CFG(scale=4.5),
        ),
        "zero_snr": Convention(
            "models of zero terminal SNR, which predict velocities and start from noise alone",
            "arXiv 2305.08891, sections 3.3 and 3.4",
            DDIM(),
            Trailing(),
            steps=25,
            rule=CFGRescale(scale=7.5),
        ),
        "flux_dev": Convention(
            "FLUX.1 dev, shift by size: sigma 1, .9045, .7595, .5128 in 4 steps at 1024 x 1024",
            "its model card, and diffusers' pipeline",
            Euler(),
            Trailing(),
            steps=28,
            rule=CFG(scale=3.5),
            policy=Embedded(),
            flow=True,
        ),
        "flux_kontext": Convention(
            "FLUX.1 Kontext dev, shift by size",
            "its model card, and diffusers' pipeline",
            Euler(),
            Trailing(),
            steps=28,
            rule=CFG(scale=2.5),
            policy=Embedded(),
            flow=True,
        ),
        "flux_schnell": Convention(
            "FLUX.1 schnell, shift 1: sigma 1, .75, .5, .25",
            "its model card, and scheduler's config",
            Euler(),
            Trailing(),
            steps=4,
            counts=(1, 2, 3, 4),
            flow=True,
        ),
        "flux2_klein": Convention(
            "FLUX.2 klein, shift by size: sigma 1, .9674, .9081, .7672 at 1024 x 1024",
            "its model card, and diffusers' pipeline",
            Euler(),
            Trailing(),
            steps=4,
            counts=(4,),
            flow=True,
        ),
        "flux2_klein_base": Convention(
            "FLUX.2 klein, base: shift by size and steps",
            "its model card, and diffusers' pipeline",
            Euler(),
            Trailing(),
            steps=50,
            rule=CFG(scale=4.0),
            flow=True,
        ),
        "qwen_image": Convention(
            "Qwen-Image, shift by size: sigma 1, .7667, .4556, .02 in 4 steps at 1024 x 1024",
            "arXiv 2508.02324, and diffusers' `QwenImagePipeline`",
            Euler(),
            Trailing(),
            steps=50,
            rule=CFG(scale=4.0),
            cfg_norm=CFGNorm(patch=2),
            flow=True,
        ),
        "qwen_image_edit_plus": Convention(
            "Qwen-Image-Edit-2509 and later, shift by size",
            "its model card, and diffusers' `QwenImageEditPlusPipeline`",
            Euler(),
            Trailing(),
            steps=40,
            rule=CFG(scale=4.0),
            cfg_norm=CFGNorm(patch=2),
            flow=True,
        ),
        "z_image_turbo": Convention(
            "Z-Image Turbo, shift 3: sigma 1, .9545, .9, .8333, .75, .6429, .5, .3",
            "its model card, and scheduler's config",
            Euler(),
            Trailing(),
            steps=8,
            counts=(8,),
            flow=True,
        ),
        "z_image": Convention(
            "Z-Image, the base model, shift 6",
            "diffusers' `ZImagePipeline`, whose scale of 5 counts from 0",
            Euler(),
            Trailing(),
            steps=50,
            rule=CFG(scale=6.0),
            flow=True,
        ),
        "sd3": Convention(
            "Stable Diffusion 3 and 3.5, shift 3",
            "diffusers' `StableDiffusion3Pipeline`",
            Euler(),
            Linspace(twice_shifted=True),
            steps=28,
            rule=CFG(scale=7.0),
            flow=True,
        ),
        "sd35_turbo": Convention(
            "Stable Diffusion 3.5 Turbo, shift 3: sigma 1, .8577, .6022, .0089",
            "its model card, and diffusers' pipeline",
            Euler(),
            Linspace(twice_shifted=True),
            steps=4,
            counts=(4,),
            flow=True,
        ),
        "sana": Convention(
            "SANA, shift 3: sigma .9997, .8996, .7496, .4997 in 4 steps",
            "its scheduler's config, and diffusers' `SanaPipeline`",
            DPMSolverPP(),
            Trailing(),
            steps=20,
            rule=CFG(scale=4.5),
            flow=True,
        ),
        "sana_sprint": Convention(
            "SANA-Sprint: angles 1.5708 and 1.3",
            "arXiv 2503.09641; diffusers' `SanaSprintPipeline`",
            LCM(),
            Angles(),
            steps=2,
            counts=(1, 2, 3, 4),
            rule=CFG(scale=4.5),
            policy=Embedded(),
            flow=True,
        ),
    }
)


def defaults_by(
    name: str,
    reason: str,
    *,
    steps: int | None = None,
    spacing: Spacing | None = None,
    rule: Rule | None = None,
) -> ModelDefaults:
    """The defaults of a model that follows a convention.

    Args:
        name: name of the convention.
        reason: why the model follows it, as a clause about the model.
        steps: default number of steps, one of the convention's; by default the convention's own.
            Where each number has its own weights, the number that the model's weights are for.
        spacing: replaces the convention's spacing where a config is more specific.
        rule: replaces the convention's rule where the scale differs.
    """
    one = CONVENTIONS[name]
    steps = one.steps if steps is None else steps
    sampler, own = one.sampler, spacing or one.spacing
    of_one = one.weights_of_counts and steps == 1
    if of_one and one.one_step is not None:
        sampler, own = one.one_step
    return ModelDefaults(
        sampler=sampler,
        spacing=own,
        steps=steps,
        rule=rule or one.rule,
        policy=one.policy,
        convention=name,
        reason=reason,
        cfg_norm=one.cfg_norm,
        counts=(steps,) if one.weights_of_counts else one.counts,
        prediction=one.one_step_prediction if of_one else None,
    )


def numbers(counts: tuple[int, ...]) -> str:
    """Format numbers of steps: "4", "1 or 4", "1 to 8", "1, 2, 4 or 8"."""
    if len(counts) > 2 and counts == tuple(range(counts[0], counts[-1] + 1)):
        return f"{counts[0]} to {counts[-1]}"
    *before, last = map(str, counts)
    return f"{', '.join(before)} or {last}" if before else last

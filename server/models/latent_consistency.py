"""Latent consistency models: Stable Diffusion distilled to a few steps and an embedded scale.

Luo et al., arXiv 2310.04378. They run as in diffusers' ``LatentConsistencyModelPipeline``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.errors import ModelMismatch
from server.models.conventions import CONVENTIONS, defaults_by
from server.models.distilled import distilled_spacing, stated
from server.models.folder import Revisions, component_class, read_json
from server.models.stable_diffusion import load_stable_diffusion
from server.models.unet_model import SCHEDULER

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from server.models.defaults import ModelDefaults
    from server.models.unet_model import UNetModel

FIXED: Mapping[str, Any] = {"clip_sample": False, "thresholding": False, "timestep_scaling": 10.0}
"""Entries of the scheduler's config that must have diffusers' default for the sampler ``lcm``."""


def load_latent_consistency(
    folder: Path, name: str, revisions: Revisions, device: torch.device, dtype: torch.dtype
) -> UNetModel:
    """Load the parts of a diffusers folder, from safetensors or GGUF files only.

    Raises:
        ModelMismatch: a part that this family cannot run, a U-Net that takes no guidance scale, or
            a scheduler that is not equivalent to the sampler ``lcm``.
    """
    component_class(folder, "scheduler", frozenset({"LCMScheduler"}))
    if read_json(folder, "unet/config.json").get("time_cond_proj_dim") is None:
        raise ModelMismatch(
            f"unet of model folder {str(folder)!r} has no time_cond_proj_dim; latent consistency "
            "models read a guidance scale through it."
        )
    scheduler = read_json(folder, SCHEDULER)
    defaults = _defaults_of(folder, scheduler)
    said = stated(folder, scheduler, embeds_scale=True)
    return load_stable_diffusion(folder, name, revisions, device, dtype, said or defaults)


def _defaults_of(folder: Path, scheduler: Mapping[str, Any]) -> ModelDefaults:
    for entry, only in FIXED.items():
        if (given := scheduler.get(entry, only)) != only:
            raise ModelMismatch(
                f"{SCHEDULER} of model folder {str(folder)!r} has the {entry} {str(given)[:40]!r}; "
                f"allowed is {only!r}."
            )
    reason = "its pipeline is a LatentConsistencyModelPipeline"
    spacing = distilled_spacing(folder, scheduler)
    steps = min(CONVENTIONS["lcm"].steps, spacing.distilled_steps)
    return defaults_by("lcm", reason, steps=steps, spacing=spacing)

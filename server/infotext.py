"""Settings as AUTOMATIC1111 writes them into a picture, which many tools read."""

from __future__ import annotations

import json

from samplers import Sampler, Spacing
from server.request import ResolvedRequest

__all__ = ["infotext"]

_SAMPLER_LABELS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lcm": "LCM",
    "unipc": "UniPC",
}
_SPACING_LABELS = {"karras": "Karras", "linspace": "Uniform", "trailing": "Trailing"}


def infotext(settings: ResolvedRequest, *, model_revision: str, version: str) -> str:
    """The text of one picture whose settings are fully resolved.

    Args:
        settings: of this picture alone, with its own seed.
        model_revision: hash of the model's weights, hex.
        version: of the program.
    """
    guidance = settings.guidance
    fields = {
        "Steps": settings.steps,
        "Sampler": _sampler_label(settings.sampler),
        "Schedule type": _spacing_label(settings.spacing),
        "CFG scale": f"{getattr(guidance, 'scale', 1.0):g}",
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model hash": model_revision[:10],
        "Model": settings.model,
        "Denoising strength": None if settings.strength is None else f"{settings.strength:g}",
        "Guidance": guidance.name,
        "Guidance policy": guidance.policy.name,
        "Guidance perturbed": "+".join(one.name for one in guidance.perturbed) or None,
        "Version": version,
    }
    line = ", ".join(
        f"{key}: {_quoted(value)}" for key, value in fields.items() if value is not None
    )
    negative = f"Negative prompt: {settings.negative_prompt}\n" if settings.negative_prompt else ""
    return f"{settings.prompt}\n{negative}{line}"


def _sampler_label(sampler: Sampler) -> str:
    if sampler.name == "dpm_solver_pp":
        kind = " SDE" if sampler.stochastic else ""
        return f"DPM++ {getattr(sampler, 'order', 2)}M{kind}"
    return _SAMPLER_LABELS.get(sampler.name, sampler.name)


def _spacing_label(spacing: Spacing) -> str:
    return _SPACING_LABELS.get(spacing.name, spacing.name)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text

"""Infotext: settings in the format that AUTOMATIC1111 writes into images and many tools read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from guidance.parts import PARTS
from samplers import Sampler
from samplers.names import label_of, schedule_type_of
from server.models.emphasis import escaped
from server.requests.conjunction import conjoined
from server.requests.controls import PRECEDENCE_LABELS, RESIZE_LABELS, ControlSettings
from server.requests.hires import UPSCALER_LABELS
from server.requests.image_prompts import ImagePromptSettings
from server.requests.schema import MaskContent, ResolvedRequest

__all__ = ["CHURN", "infotext"]

MASKED_CONTENT: Final[Mapping[MaskContent, str]] = {
    "fill": "fill",
    "latent_noise": "latent noise",
    "latent_nothing": "latent nothing",
}
"""AUTOMATIC1111's names for mask contents; it omits the original."""

CHURN: Final[Mapping[str, str]] = {
    "Sigma churn": "s_churn",
    "Sigma tmin": "s_tmin",
    "Sigma tmax": "s_tmax",
    "Sigma noise": "s_noise",
}
"""AUTOMATIC1111's names for the fields of a sampler with churn."""

_BREAK = r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]"
_FIELD = re.compile(rf"(negative\s+prompt|(?:\A|(?<={_BREAK}))\s*steps):", re.IGNORECASE)
"""Markers that readers search for: the first anywhere, the second at the beginning of a line."""


def infotext(
    settings: ResolvedRequest,
    *,
    model_revision: str,
    version: str,
    statistics: str | None = None,
    dtype: str = "float32",
    quantization: str = "none",
    weighs_prompts: bool = False,
) -> str:
    """Return the infotext of one image.

    Args:
        settings: settings of this image alone, with its own seed and every default filled in.
        model_revision: hash of the model's weights, hexadecimal.
        version: version of this program.
        statistics: guidance whose model statistics the sampler was planned with, if any.
        dtype: dtype of the model's computation; written unless it is float32.
        quantization: quantization of the model's weights; written unless it is "none".
        weighs_prompts: whether the model reads weights in prompts. Its plain prompts are escaped,
            since readers of the text would take their brackets for weights.
    """
    guidance, hires = settings.guidance, settings.hires
    strength = settings.strength if hires is None else hires.strength
    fields = {
        "Steps": settings.steps,
        "Sampler": label_of(settings.sampler),
        "Schedule type": schedule_type_of(settings.spacing),
        "CFG scale": f"{getattr(guidance, 'scale', 1.0):g}",
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model hash": model_revision[:10],
        "Model": settings.model,
        "Dtype": None if dtype == "float32" else dtype,
        "Quantization": None if quantization == "none" else quantization,
        "Autoencoder": settings.autoencoder,
        "Clip skip": settings.clip_skip if (settings.clip_skip or 1) > 1 else None,
        **_start_noise(settings),
        "Denoising strength": None if strength is None else f"{strength:g}",
        **_churn(settings.sampler),
        "Masked content": MASKED_CONTENT.get(settings.mask_content or "original"),
        **_hires(settings),
        "Guidance": guidance.name,
        **{f"Guidance {part.label}": _part(getattr(guidance, part.field)) for part in PARTS},
        "Step cache": _part(settings.cache),
        "Lora": " ".join(f"<lora:{one.name}:{one.weight:g}>" for one in settings.adapters) or None,
        **{f"ControlNet {i}": _control(one) for i, one in enumerate(settings.controls)},
        "Reference images": settings.reference_images,
        **{f"IP-Adapter {i}": _windowed(one) for i, one in enumerate(settings.image_prompts)},
        "Sampler statistics": statistics,
        "Version": version,
    }
    line = ", ".join(
        f"{key}: {_quoted(value)}" for key, value in fields.items() if value is not None
    )
    written = escaped if weighs_prompts and settings.prompt_syntax is None else str
    negative = settings.negative_prompt
    told = f"Negative prompt: {_harmless(written(negative))}\n" if negative else ""
    scale, others = getattr(guidance, "scale", 1.0), getattr(guidance, "prompts", ())
    joined = [(written(one.prompt), one.weight) for one in others]
    prompt = conjoined(written(settings.prompt), scale, joined)
    return f"{_harmless(prompt)}\n{told}{line}"


def _start_noise(settings: ResolvedRequest) -> dict[str, Any]:
    """Return the settings of the start noise besides the seed, by AUTOMATIC1111's names."""
    variation, size = settings.variation, settings.noise_size
    return {
        "Variation seed": None if variation is None else variation.seed,
        "Variation seed strength": None if variation is None else f"{variation.strength:g}",
        "Seed resize from": None if size is None else f"{size.width}x{size.height}",
    }


def _churn(sampler: Sampler) -> dict[str, str]:
    """Return the sampler's churn settings that are not defaults, by AUTOMATIC1111's names."""
    if not getattr(sampler, "s_churn", 0):
        return {}
    own = sampler.model_dump(exclude_defaults=True)
    return {label: f"{own[field]:g}" for label, field in CHURN.items() if field in own}


def _hires(settings: ResolvedRequest) -> dict[str, Any]:
    """Return the fields of a second run, by AUTOMATIC1111's names."""
    hires = settings.hires
    if hires is None:
        return {}
    width, height = hires.size
    return {
        "Hires resize": f"{width}x{height}",
        "Hires steps": hires.steps,
        "Hires upscaler": UPSCALER_LABELS[hires.upscaler],
    }


def _harmless(prompt: str) -> str:
    """Return the prompt with any line disarmed that readers would take for a field of the text."""
    return _FIELD.sub(r"\1 :", prompt)


def _part(held: Any) -> str | None:
    """Return a short text for a part of guidance; None if the request leaves it out."""
    if isinstance(held, tuple):
        return "+".join(filter(None, map(_part, held))) or None
    if held is None:
        return None
    own = held.model_dump(mode="json", exclude_defaults=True)
    return getattr(held, "name", None) or _listed(own) or "on"


def _windowed(one: ControlSettings | ImagePromptSettings) -> str:
    """Return a unit as AUTOMATIC1111's ControlNet extension writes it."""
    window = f"Guidance Start: {one.start:g}, Guidance End: {one.end:g}"
    return f"Model: {one.name}, Weight: {one.scale:g}, {window}"


def _control(one: ControlSettings) -> str:
    """Return a ControlNet like :func:`_windowed`, with the processing of its picture."""
    resized = "" if one.resize_mode is None else f", Resize Mode: {RESIZE_LABELS[one.resize_mode]}"
    prepared = "" if one.preprocessor is None else f"Module: {one.preprocessor}, "
    label = PRECEDENCE_LABELS[one.precedence]
    led = "" if one.precedence is None else f", Control Mode: {label}"
    return f"{prepared}{_windowed(one)}{resized}{led}"


def _listed(fields: dict[str, Any]) -> str:
    return "; ".join(f"{name} {value}" for name, value in fields.items())


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text

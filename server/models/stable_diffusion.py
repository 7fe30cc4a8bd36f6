"""The Stable Diffusion family: one CLIP text encoder, a U-Net, an autoencoder."""

from __future__ import annotations

from contextlib import nullcontext
from math import log
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from guidance.edits import WeakModel
from samplers import NoiseSchedule
from server.errors import ModelMismatch
from server.models.conditioning import Conditioning
from server.models.folder import component_class, read_json
from server.models.hosted import HostedModel, ModelFacts
from server.models.row_edits import RowEdits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from guidance.edits import Edit
    from server.models.inputs import RowInputs

COMPONENTS: Mapping[str, frozenset[str]] = {
    "unet": frozenset({"UNet2DConditionModel"}),
    "vae": frozenset({"AutoencoderKL", "AutoencoderTiny"}),
    "text_encoder": frozenset({"CLIPTextModel"}),
    "tokenizer": frozenset({"CLIPTokenizer", "CLIPTokenizerFast"}),
}
"""Classes that a folder may name; nothing else is ever imported for it."""

MARKERS = 2
"""Tokens of start and end, which count towards the text encoder's length."""

WEAK_FOLDER = "weft/weak"
"""Where a model folder may hold a weaker U-Net: smaller or less trained, of the same latents."""

TEXT = "encoder_hidden_states"
"""Of conditioning, what the U-Net's cross-attention reads, ``[tokens, features]``."""

LONGEST_PERIOD = log(10_000)
"""Logarithm of how much slower the last angle of a scale's embedding turns than the first."""


class StableDiffusion(HostedModel):
    """Stable Diffusion 1.x and 2.x, and models of the same parts."""

    def __init__(
        self,
        facts: ModelFacts,
        device: torch.device,
        dtype: torch.dtype,
        *,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        weak: Any = None,
    ) -> None:
        super().__init__(facts, device, dtype)
        self._unet = unet.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self._vae = vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self._edits = RowEdits(self._unet)
        self._weak = weak and weak.to(device, memory_format=torch.channels_last).eval()
        self._text = text_encoder.to(device).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        # A fast tokenizer refuses two threads at once.
        self._tokenizing = Lock()

    @override
    def make_differentiable(self) -> None:
        # Group norm has no forward mode over channels_last.
        self._unet.to(memory_format=torch.contiguous_format)

    @override
    def count_tokens(self, text: str) -> int:
        with self._tokenizing:
            return len(self._tokenizer(text, verbose=False).input_ids) - MARKERS

    @override
    def encode_prompts(
        self, prompts: Sequence[str | None], width: int, height: int
    ) -> list[Conditioning]:
        with self._tokenizing:
            tokens = self._tokenizer(
                [prompt or "" for prompt in prompts],
                padding="max_length",
                max_length=self.facts.max_tokens + MARKERS,
                truncation=True,
                return_tensors="pt",
            ).input_ids
        hidden = self._text(tokens.to(self.device))[0]
        # A view would keep the whole batch of prompts in memory.
        return [Conditioning({TEXT: row.clone()}, len(row)) for row in hidden]

    @override
    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        told = {}
        if self.facts.embeds_scale:
            scales = inputs.scale_embedding
            scales = t.new_zeros(len(t)) if scales is None else scales
            size = self._unet.config.time_cond_proj_dim
            told["timestep_cond"] = embedding_of_scales(scales, size).to(self.dtype)
        if inputs.channels is not None:
            x = torch.cat([x, inputs.channels], 1)
        edited = self._edits.applied(inputs.edits, x) if any(inputs.edits) else nullcontext()
        with edited:
            return _forward(self._unet, x.to(self.dtype), t, inputs, **told)

    @override
    def evaluate_weak(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        if self._weak is None:
            return super().evaluate_weak(x, t, inputs)
        return _forward(self._weak, x.to(self.dtype), t, inputs)

    @override
    def layers(self) -> tuple[str, ...]:
        return self._edits.layers()

    @override
    def refuses(self, edit: Edit) -> str | None:
        if isinstance(edit, WeakModel) and self._weak is not None:
            return None
        return self._edits.refuses(edit)

    @override
    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents / self._vae.config.scaling_factor + _shift(self._vae)
        return self._vae.decode(scaled.to(self.dtype), return_dict=False)[0].float()

    @override
    def encode_image(self, pixels: Tensor) -> Tensor:
        encoded = self._vae.encode(pixels.to(self.dtype))
        # The mean of the posterior, not a sample: the same picture gives the same latent.
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (latents.float() - _shift(self._vae)) * self._vae.config.scaling_factor


def load_stable_diffusion(
    folder: Path, name: str, revision: str, device: torch.device, dtype: torch.dtype
) -> StableDiffusion:
    """Load the parts of a diffusers folder from safetensors alone.

    Raises:
        ModelMismatch: a part that this family cannot run.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    classes = {part: component_class(folder, part, COMPONENTS[part]) for part in COMPONENTS}
    autoencoder = AutoencoderKL if classes["vae"] == "AutoencoderKL" else AutoencoderTiny
    weights = {"use_safetensors": True, "local_files_only": True, "torch_dtype": dtype}
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", **weights)
    vae = autoencoder.from_pretrained(folder / "vae", **weights)
    text_encoder = CLIPTextModel.from_pretrained(
        folder / "text_encoder", use_safetensors=True, local_files_only=True, dtype=dtype
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    scheduler = read_json(folder, "scheduler/scheduler_config.json")
    facts = _facts(name, revision, unet.config, vae.config, tokenizer, scheduler)
    return StableDiffusion(
        facts,
        device,
        dtype,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        weak=_companion(folder, weights),
    )


def _facts(
    name: str, revision: str, unet: Any, vae: Any, tokenizer: Any, scheduler: Mapping[str, Any]
) -> ModelFacts:
    if unet.in_channels != unet.out_channels:
        raise ModelMismatch(
            f"model {name!r} has a U-Net of {unet.in_channels} input channels; "
            f"only those with as many as they put out ({unet.out_channels}) are hosted."
        )
    latent_scale = 2 ** (len(vae.block_out_channels) - 1)
    sample = unet.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return ModelFacts(
        name=name,
        revision=revision,
        schedule=NoiseSchedule.from_diffusers(scheduler),
        prediction=scheduler.get("prediction_type", "epsilon"),
        latent_channels=unet.in_channels,
        latent_scale=latent_scale,
        size_multiple=latent_scale * 2 ** (len(unet.block_out_channels) - 1),
        default_width=width * latent_scale,
        default_height=height * latent_scale,
        max_tokens=tokenizer.model_max_length - MARKERS,
        embeds_scale=unet.time_cond_proj_dim is not None,
    )


def embedding_of_scales(scales: Tensor, size: int) -> Tensor:
    """What a latent consistency model is told of the guidance scale (arXiv 2310.04378).

    Args:
        scales: guidance scales less 1, ``[rows]``.
        size: even number of features.

    Returns:
        ``[rows, size]``: sines, then cosines, at frequencies from 1000 down to 0.1.
    """
    half = size // 2
    # Angles reach thousands, where float32 rounds by 1e-3: so in the order LCMs were trained with.
    steps = torch.arange(half, dtype=torch.float32, device=scales.device)
    angles = 1000 * scales.float()[:, None] * torch.exp(steps * -(LONGEST_PERIOD / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], 1)


def _forward(unet: Any, x: Tensor, t: Tensor, inputs: RowInputs, **told: Tensor) -> Tensor:
    return unet(x, t, inputs.conditioning.tensors[TEXT], return_dict=False, **told)[0].float()


def _companion(folder: Path, weights: Mapping[str, Any]) -> Any:
    """The weaker U-Net that a model folder may hold, for autoguidance."""
    from diffusers import UNet2DConditionModel

    place = folder / WEAK_FOLDER
    if not place.is_dir():
        return None
    return UNet2DConditionModel.from_pretrained(place, **weights).requires_grad_(False)


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0

"""SANA and SANA-Sprint: Gemma's text after an instruction, and a transformer of linear attention.

Xie et al., arXiv 2410.10629; Chen et al., arXiv 2503.09641. They run as in diffusers'
``SanaPipeline`` and ``SanaSprintPipeline``, but at the requested size.

SANA-Sprint's TrigFlow is equivalent to a plain flow: at the angle ``a`` its network receives the
time ``s = sin a / (cos a + sin a)`` and ``(1 - s) x0 + s noise``, and its output is the velocity of
that flow.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from samplers import NoiseSchedule
from server.errors import ModelMismatch
from server.models.autoencoder import Autoencoder
from server.models.conditioning import MASK, Conditioning, StackedConditioning, stack_padded
from server.models.conventions import defaults_by
from server.models.distilled import stated
from server.models.folder import component_class, read_json
from server.models.hosted import ModelFacts
from server.models.parts import load_network, load_text_encoder, load_tokenizer
from server.models.text_side import to_lowercase
from server.models.transformer_model import TRANSFORMER, TransformerModel, check_channels
from server.models.unet_model import SCHEDULER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from samplers.levels import F64
    from server.models.defaults import ModelDefaults
    from server.models.folder import Revisions
    from server.models.inputs import RowInputs
    from server.models.text_options import TextOptions

__all__ = ["SanaDenoiser", "load_sana", "load_sana_sprint"]

TEXT = "text"
"""Name of the conditioning tensor with Gemma's hidden states, ``[tokens, features]``."""

LENGTH = 300
"""Maximum number of tokens that the transformer reads of a prompt, including the start marker."""

NEGATIVE = "\N{NULL}"
"""Prefix that marks the text of a negative prompt, which is encoded without the instruction."""

INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual "
        "descriptions suitable for image generation. Evaluate the level of detail in the user "
        "prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, "
        "textures, and spatial relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly "
        "without overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round "
        "shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red "
        "flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, "
        "featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a "
        "double-decker bus passing by towering glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including "
        "any additional commentary or evaluations:",
        "User Prompt: ",
    )
)
"""Instruction before each prompt, verbatim from diffusers' pipelines."""


class InstructedGemma:
    """Encodes prompts after an instruction, whose own hidden states are dropped.

    The last hidden states of the prompt's tokens are kept, with those of the start marker and of
    the instruction's last token. A negative prompt is encoded without the instruction; the
    unconditional is the empty negative prompt.

    Args:
        encoder: a ``Gemma2Model`` in inference mode.
        tokenizer: its tokenizer, which adds the start marker.
        device: device of the encoder.
    """

    def __init__(self, encoder: Any, tokenizer: Any, device: torch.device) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._device = device
        # A fast tokenizer raises an error if two threads use it at once.
        self._tokenizing = Lock()
        self._instruction: int = len(tokenizer.encode(INSTRUCTION))

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt, excluding the start marker."""
        return LENGTH - 2

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a prompt, excluding the start marker; safe from any thread."""
        with self._tokenizing:
            return len(self._tokenizer(to_lowercase(text), verbose=False).input_ids) - 1

    def encode(
        self, prompts: Sequence[str | None], width: int, height: int, options: TextOptions
    ) -> list[Conditioning]:
        """Conditioning of each prompt at its own length; it does not depend on the image size."""
        tokens = [self._tokens_of(prompt) for prompt in prompts]
        longest = max(map(len, tokens))
        ids = torch.tensor([own + [0] * (longest - len(own)) for own in tokens])
        mask = torch.tensor([[1] * len(own) + [0] * (longest - len(own)) for own in tokens])
        states = self._encoder(
            ids.to(self._device), attention_mask=mask.to(self._device)
        ).last_hidden_state
        made: list[Conditioning] = []
        for prompt, own, row in zip(prompts, tokens, states, strict=True):
            first = 1 if _is_negative(prompt) else self._instruction - 1
            text = torch.cat([row[:1], row[first : len(own)]])
            made.append(Conditioning({TEXT: text}, len(text)))
        return made

    def modules(self) -> Mapping[str, nn.Module]:
        """The text encoder by its name in a model folder."""
        return {"text_encoder": self._encoder}

    def _tokens_of(self, prompt: str | None) -> list[int]:
        text = to_lowercase((prompt or "").removeprefix(NEGATIVE))
        max_length = LENGTH
        if not _is_negative(prompt):
            text, max_length = INSTRUCTION + text, self._instruction + LENGTH - 2
        with self._tokenizing:
            return self._tokenizer(text, truncation=True, max_length=max_length).input_ids


class SanaDenoiser:
    """The transformer, which predicts the velocity of a flow.

    Args:
        network: a ``SanaTransformer2DModel`` in inference mode.
    """

    def __init__(self, network: Any) -> None:
        self.network = network

    def __call__(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """See ``HostedModel.evaluate``."""
        tensors, config, dtype = (
            inputs.conditioning.tensors,
            self.network.config,
            self.network.dtype,
        )
        guidance: Tensor | None = None
        if config.guidance_embeds:
            scales = inputs.scale_embedding
            guidance = torch.ones_like(t) if scales is None else scales + 1
            guidance = guidance.to(dtype) * config.guidance_embeds_scale
        raw = self.network(
            x.to(dtype),
            encoder_hidden_states=tensors[TEXT],
            encoder_attention_mask=tensors.get(MASK),
            timestep=t,
            guidance=guidance,
            return_dict=False,
        )[0]
        return raw[:, : x.shape[1]].float()


def load_sana(
    folder: Path, name: str, revisions: Revisions, device: torch.device, dtype: torch.dtype
) -> TransformerModel:
    """Load the parts of a diffusers folder, from safetensors or GGUF files only.

    Raises:
        ModelMismatch: a part that this family cannot run, or a scheduler that is not for flow
            matching.
    """
    scheduler = read_json(folder, SCHEDULER)
    kind = str(scheduler.get("_class_name", ""))
    if not kind.startswith("FlowMatch") and not scheduler.get("use_flow_sigmas"):
        raise ModelMismatch(
            f"{SCHEDULER} of model folder {str(folder)!r} has the class {kind[:60]!r} and no "
            "use_flow_sigmas; SANA matches a flow, so one of FlowMatchEulerDiscreteScheduler and "
            "a scheduler with use_flow_sigmas is needed."
        )
    predicts = scheduler.get("prediction_type", "flow_prediction")
    if predicts != "flow_prediction":
        raise ModelMismatch(
            f"{SCHEDULER} of model folder {str(folder)!r} has the prediction_type "
            f"{str(predicts)[:40]!r}; SANA predicts a velocity, so only flow_prediction is allowed."
        )
    if scheduler.get("shift_terminal"):
        raise ModelMismatch(
            f"{SCHEDULER} of model folder {str(folder)!r} has the shift_terminal "
            f"{str(scheduler['shift_terminal'])[:40]!r}; for SANA only null is supported."
        )
    schedule = NoiseSchedule.from_diffusers(scheduler)
    scale = float(read_json(folder, f"{TRANSFORMER}/config.json").get("timestep_scale", 1.0))
    # Schedulers of other classes, configured for a flow, pass timesteps rounded down.
    rounds = not kind.startswith("FlowMatch")

    def network_time(t: F64) -> F64:
        timesteps = schedule.conditioning(t)
        return scale * (np.floor(timesteps) if rounds else timesteps)

    defaults = stated(folder, scheduler, embeds_scale=False, flow=True)
    defaults = defaults or defaults_by("sana", "it is a SanaPipeline")
    return _load(folder, name, revisions, device, dtype, schedule, network_time, defaults)


def load_sana_sprint(
    folder: Path, name: str, revisions: Revisions, device: torch.device, dtype: torch.dtype
) -> TransformerModel:
    """Load the parts of a diffusers folder, from safetensors or GGUF files only.

    Raises:
        ModelMismatch: a part that this family cannot run.
    """
    component_class(folder, "scheduler", frozenset({"SCMScheduler"}))
    defaults = stated(folder, read_json(folder, SCHEDULER), embeds_scale=True, flow=True)
    defaults = defaults or defaults_by("sana_sprint", "it is a SanaSprintPipeline")
    schedule = NoiseSchedule.flow()
    return _load(folder, name, revisions, device, dtype, schedule, _itself, defaults)


def _load(
    folder: Path,
    name: str,
    revisions: Revisions,
    device: torch.device,
    dtype: torch.dtype,
    schedule: NoiseSchedule,
    network_time: Callable[[F64], F64],
    defaults: ModelDefaults,
) -> TransformerModel:
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Gemma2Model, GemmaTokenizer

    encoder = load_text_encoder(folder, "text_encoder", Gemma2Model, dtype)
    positions = encoder.config.max_position_embeddings
    tokenizer = load_tokenizer(folder, "tokenizer", GemmaTokenizer, positions)
    text = InstructedGemma(encoder, tokenizer, device)
    transformer = load_network(folder, TRANSFORMER, [SanaTransformer2DModel], dtype)
    vae = load_network(folder, "vae", [AutoencoderDC], dtype)
    check_channels(folder, transformer.config.in_channels, vae.config.latent_channels)
    latent_scale = 2 ** (len(vae.config.encoder_block_out_channels) - 1)
    side = transformer.config.sample_size * latent_scale
    facts = ModelFacts(
        name=name,
        revision=revisions.weights,
        denoiser=revisions.denoiser,
        prediction="flow",
        latent_channels=transformer.config.in_channels,
        latent_scale=latent_scale,
        size_multiple=transformer.config.patch_size * latent_scale,
        default_width=side,
        default_height=side,
        max_tokens=text.max_tokens,
        embeds_scale=bool(transformer.config.guidance_embeds),
        defaults=defaults,
    )
    return TransformerModel(
        facts,
        device,
        dtype,
        schedule=lambda *_: schedule,
        denoiser=SanaDenoiser(transformer),
        autoencoder=Autoencoder(vae, device),
        text=text,
        stack=_stack,
        network_time=network_time,
        negative=_negative,
    )


def _stack(rows: Sequence[Conditioning], *, fixed: bool) -> StackedConditioning:
    return stack_padded(rows, TEXT, places=LENGTH if fixed else None)


def _negative(prompt: str | None) -> str | None:
    return None if prompt is None else NEGATIVE + prompt


def _is_negative(prompt: str | None) -> bool:
    return prompt is None or prompt.startswith(NEGATIVE)


def _itself(t: F64) -> F64:
    return t

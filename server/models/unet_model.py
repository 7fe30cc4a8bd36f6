"""Models that consist of a U-Net, an autoencoder and a family's text side."""

from __future__ import annotations

from contextlib import nullcontext
from math import lcm, log
from typing import TYPE_CHECKING, Any, Final

import torch
from typing_extensions import override

from guidance.edits import WeakModel
from samplers import NoiseSchedule, PredictionType
from server.errors import ModelMismatch
from server.models.autoencoder import Autoencoder
from server.models.conditioning import Conditioning, stack_alike
from server.models.controls.unet_control import UNetControl
from server.models.embeddings.embedding_file import EmbeddingTarget
from server.models.folder import read_json
from server.models.hosted import HostedModel, ModelFacts
from server.models.image_prompts.unet_image_prompts import UNetImagePrompts
from server.models.inpainting import MaskChannels
from server.models.parts import build_network
from server.models.row_changes import RowChanges
from server.models.text_options import AS_USUAL

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from guidance.edits import Edit
    from server.models.adapters.adapter import RowAdapters
    from server.models.blend import TextPrompt
    from server.models.conditioning import StackedConditioning
    from server.models.defaults import ModelDefaults
    from server.models.folder import Revisions
    from server.models.inputs import RowInputs
    from server.models.text_options import TextOptions
    from server.models.text_side import EmbeddableText

TEXT = "encoder_hidden_states"
"""Name of the conditioning tensor that the U-Net's cross-attention reads, ``[tokens, features]``.

All other tensors are passed to the U-Net as added conditioning, under the same names.
"""

UNET = "unet"
"""Name of the denoiser in a model folder."""

WEAK_FOLDER = "weft/weak"
"""Subfolder of a model folder for a weaker U-Net: smaller or less trained, on the same latents."""

SCHEDULER = "scheduler/scheduler_config.json"

PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")

LOG_MAX_PERIOD = log(10_000)
"""Logarithm of the ratio of the first to the last frequency of the guidance scale's embedding."""

OF_OTHER_MODELS: Final = ("EDM", "FlowMatch", "SCM")
"""Prefixes of schedulers whose models have another prediction type and noise process."""


class UNetModel(HostedModel):
    """A diffusers U-Net with an autoencoder and a family's text side.

    Its conditioning has a tensor named ``TEXT``.

    Args:
        facts: facts about the model.
        device: device on which it runs.
        dtype: dtype of the U-Net and the text encoders.
        schedule: noise schedule of all runs.
        unet: a ``UNet2DConditionModel`` in inference mode.
        vae: an ``AutoencoderKL`` or ``AutoencoderTiny`` in inference mode.
        text: encodes prompts.
        weak: a weaker U-Net with the same latents, for autoguidance; None for none.
    """

    weighs_prompts = True

    def __init__(
        self,
        facts: ModelFacts,
        device: torch.device,
        dtype: torch.dtype,
        *,
        schedule: NoiseSchedule,
        unet: Any,
        vae: Any,
        text: EmbeddableText,
        weak: Any = None,
    ) -> None:
        super().__init__(facts, device, dtype)
        self._schedule = schedule
        self._unet = unet.to(memory_format=torch.channels_last)
        self._weak = weak and weak.to(memory_format=torch.channels_last)
        self._autoencoder = Autoencoder(vae, device)
        self._beside = None
        if facts.reads_mask:
            self._beside = MaskChannels(self._autoencoder, facts.latent_scale, device)
        self._text = text
        self._control = UNetControl(self._unet, facts, device)
        self._pictures: UNetImagePrompts | None = None
        if UNetImagePrompts.taken_by(self._unet):
            self._pictures = UNetImagePrompts(self._unet)
        self._changes = RowChanges(UNET, self.adaptable(), device)

    @override
    def schedule(self, width: int, height: int, steps: int) -> NoiseSchedule:
        return self._schedule

    @property
    @override
    def memory_format(self) -> str:
        # Convolutions are optimized for channels_last, both on GPUs and on CPUs.
        weight = self._unet.conv_in.weight
        by_channels = weight.is_contiguous(memory_format=torch.channels_last)
        return "channels_last" if by_channels else super().memory_format

    @override
    def make_differentiable(self) -> None:
        # Group norm does not support forward-mode AD with channels_last.
        self._unet.to(memory_format=torch.contiguous_format)

    @override
    def count_tokens(self, text: str) -> int:
        found = self.embeddings.named_in(text)
        return self._text.count_tokens(text, {one.name: one.vectors for one in found})

    @override
    def embedding_target(self) -> EmbeddingTarget:
        facts = self.facts
        return EmbeddingTarget(facts.name, self._text.widths, facts.max_tokens)

    @override
    def encode_prompts(
        self,
        prompts: Sequence[str | None],
        width: int,
        height: int,
        adapters: RowAdapters | None = None,
        options: TextOptions = AS_USUAL,
    ) -> list[Conditioning]:
        with self._changes.of_texts(adapters):
            return self._text.encode(prompts, width, height, options)

    @override
    def group_key(self, width: int, height: int, length: int) -> Hashable:
        return length

    @override
    def stack(self, rows: Sequence[Conditioning], *, fixed: bool = False) -> StackedConditioning:
        return stack_alike([_laid_out(row) for row in rows])

    @override
    def equalize_lengths(
        self, texts: Mapping[TextPrompt, Conditioning]
    ) -> dict[TextPrompt, Conditioning]:
        # Attention to a text that is repeated as a whole equals attention to the text.
        common = lcm(*(one.length for one in texts.values()))
        return {prompt: _repeated(one, common // one.length) for prompt, one in texts.items()}

    @override
    def channels(
        self, picture: Tensor | None, mask: Tensor | None, width: int, height: int
    ) -> Tensor | None:
        if self._beside is None:
            return None
        if picture is None or mask is None:
            return self._beside.without_picture(*self.latent_shape(width, height)[1:])
        return self._beside.of(picture, mask)

    @override
    def in_tensors(self, inputs: RowInputs) -> RowInputs:
        return self._changes.in_tensors(super().in_tensors(inputs))

    @override
    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        kwargs: dict[str, Any] = {}
        if inputs.controls is not None:
            own = x.to(self.dtype), t, inputs.conditioning, inputs.controls
            kwargs |= self._control.residuals(*own)
        if self.facts.embeds_scale:
            scales = inputs.scale_embedding
            scales = t.new_zeros(len(t)) if scales is None else scales
            size = self._unet.config.time_cond_proj_dim
            kwargs["timestep_cond"] = embedding_of_scales(scales, size).to(self.dtype)
        channels = inputs.channels
        if channels is None and self._beside is not None:
            channels = self._beside.without_picture(*x.shape[2:]).expand(len(x), -1, -1, -1)
        if channels is not None:
            x = torch.cat([x, channels], 1)
        against = None if inputs.against is None else inputs.against.tensors[TEXT]
        changed = self._changes.of_rows(inputs, x, against)
        pictured = nullcontext()
        if self._pictures is not None:
            pictured = self._pictures.applied(inputs.image_prompts)
        with changed, pictured, self.blocks_running(inputs):
            return _forward(self._unet, x.to(self.dtype), t, inputs, **kwargs)

    @override
    def evaluate_weak(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        if self._weak is None:
            return super().evaluate_weak(x, t, inputs)
        return _forward(self._weak, x.to(self.dtype), t, inputs)

    @override
    def adaptable(self) -> Mapping[str, nn.Module]:
        return {UNET: self._unet, **self._text.modules()}

    @property
    @override
    def autoencoder(self) -> Autoencoder:
        return self._autoencoder

    @property
    @override
    def control_kind(self) -> UNetControl:
        return self._control

    @property
    @override
    def image_attention(self) -> UNetImagePrompts | None:
        return self._pictures

    @override
    def layers(self) -> tuple[str, ...]:
        return self._changes.edits.layers()

    @override
    def refuses(self, edit: Edit) -> str | None:
        if isinstance(edit, WeakModel) and self._weak is not None:
            return None
        return self._changes.edits.refuses(edit)

    @override
    def decode(self, latents: Tensor) -> Tensor:
        return self._autoencoder.decode(latents)

    @override
    def encode_image(self, pixels: Tensor) -> Tensor:
        return self._autoencoder.encode(pixels)

    @override
    def modules(self) -> Mapping[str, nn.Module]:
        weak = {} if self._weak is None else {WEAK_FOLDER: self._weak}
        return {
            UNET: self._unet,
            "vae": self._autoencoder.network,
            **self._text.modules(),
            **weak,
        }


def _laid_out(one: Conditioning) -> Conditioning:
    """Make a text that is repeated as a view contiguous."""
    text = one.tensors[TEXT].flatten(0, -2)
    return Conditioning({**one.tensors, TEXT: text}, one.length)


def _repeated(one: Conditioning, times: int) -> Conditioning:
    if times == 1:
        return one
    # A view, since an image may use many texts; `stack` makes it contiguous.
    text = one.tensors[TEXT].expand(times, -1, -1)
    return Conditioning({**one.tensors, TEXT: text}, times * one.length)


def facts_of(
    folder: Path,
    name: str,
    revisions: Revisions,
    unet: Any,
    vae: Any,
    text: EmbeddableText,
    defaults: ModelDefaults | None = None,
) -> ModelFacts:
    """The facts about a model according to a folder's configs.

    Args:
        folder: model folder.
        name: name that requests use for the model.
        revisions: revisions of its weights.
        unet: the U-Net.
        vae: the autoencoder.
        text: encodes prompts.
        defaults: settings of requests that leave them out; None for the server's defaults.

    Raises:
        ModelMismatch: the U-Net has inputs other than latents, with or without a mask and a masked
            image, or the prediction type is unknown.
    """
    scheduler = read_json(folder, SCHEDULER)
    config, latent_scale = unet.config, 2 ** (len(vae.config.block_out_channels) - 1)
    latents, reads = config.out_channels, config.in_channels
    if reads not in (latents, 2 * latents + 1):
        raise ModelMismatch(
            f"model {name!r} has a U-Net of {reads} input channels; allowed are {latents}, its "
            f"latents alone, and {2 * latents + 1}, with a mask and the latents of a masked image."
        )
    prediction = scheduler.get("prediction_type", "epsilon")
    if defaults is not None and defaults.prediction is not None:
        prediction = defaults.prediction
    if prediction not in PREDICTIONS:
        raise ModelMismatch(
            f"scheduler_config.json of model folder {str(folder)!r} has the prediction_type "
            f"{str(prediction)[:40]!r}; allowed are {', '.join(PREDICTIONS)}."
        )
    sample = config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return ModelFacts(
        name=name,
        revision=revisions.weights,
        denoiser=revisions.denoiser,
        prediction=prediction,
        latent_channels=latents,
        latent_scale=latent_scale,
        # The U-Net pads odd numbers of cells where it halves them.
        size_multiple=latent_scale,
        default_width=width * latent_scale,
        default_height=height * latent_scale,
        max_tokens=text.max_tokens,
        embeds_scale=config.time_cond_proj_dim is not None,
        reads_mask=reads > latents,
        clip_skips=text.clip_skips,
        defaults=defaults,
    )


def schedule_of(folder: Path) -> NoiseSchedule:
    """The noise schedule in the config of a folder's scheduler.

    Raises:
        ModelMismatch: there is no such config, or it is for flow matching or EDM.
        ValueError: the noise schedule is unsupported.
    """
    config = read_json(folder, SCHEDULER)
    name = str(config.get("_class_name", ""))
    if name.startswith(OF_OTHER_MODELS) or config.get("use_flow_sigmas"):
        raise ModelMismatch(
            f"{SCHEDULER} of model folder {str(folder)!r} names the {name[:80]}"
            f"{' with use_flow_sigmas' if config.get('use_flow_sigmas') else ''}; of this family "
            "only models with betas are hosted, none of flow matching or of EDM's preconditioning."
        )
    return NoiseSchedule.from_diffusers(config)


def load_companion(folder: Path, dtype: torch.dtype) -> Any:
    """Load the weaker U-Net in a model folder, for autoguidance; None where there is none."""
    from diffusers import UNet2DConditionModel

    if not (folder / WEAK_FOLDER).is_dir():
        return None
    return build_network(folder, WEAK_FOLDER, UNet2DConditionModel, dtype)


def embedding_of_scales(scales: Tensor, size: int) -> Tensor:
    """Embedding of the guidance scale for latent consistency models (arXiv 2310.04378).

    Args:
        scales: guidance scales less 1, ``[rows]``.
        size: number of features, even.

    Returns:
        ``[rows, size]``: sines, then cosines, at frequencies from 1000 down to 0.1.
    """
    half = size // 2
    # Angles reach thousands, where float32 rounds by 1e-3: keep the order of LCMs' training code.
    steps = torch.arange(half, dtype=torch.float32, device=scales.device)
    angles = 1000 * scales.float()[:, None] * torch.exp(steps * -(LOG_MAX_PERIOD / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], 1)


def _forward(unet: Any, x: Tensor, t: Tensor, inputs: RowInputs, **kwargs: Any) -> Tensor:
    added = dict(inputs.conditioning.tensors)
    text = added.pop(TEXT)
    if added:
        return unet(x, t, text, added_cond_kwargs=added, return_dict=False, **kwargs)[0].float()
    return unet(x, t, text, return_dict=False, **kwargs)[0].float()

"""The interface between the engine and a model of any family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from server.models.adapters.placing import Target
from server.models.adapters.shelf import AdapterShelf
from server.models.conditioning import stack_alike
from server.models.controls.control import Control
from server.models.controls.shelf import ControlShelf
from server.models.embeddings.embedding_file import EmbeddingTarget
from server.models.embeddings.shelf import EmbeddingShelf
from server.models.gguf.layers import kinds_of
from server.models.image_prompts.shelf import ImagePromptShelf
from server.models.inputs import RowInputs
from server.models.linear_fits import LinearFits
from server.models.placement import Placement
from server.models.statistics import ModelStatistics
from server.models.text_options import AS_USUAL
from server.models.weight_memory import WeightMemory

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from guidance.edits import Edit
    from samplers import NoiseSchedule, PredictionType
    from samplers.levels import F64
    from server.models.adapters.adapter import RowAdapters
    from server.models.autoencoder import Autoencoder
    from server.models.blend import TextPrompt
    from server.models.classifier import LatentClassifier
    from server.models.compiling.compiled_blocks import CompiledBlocks
    from server.models.conditioning import Conditioning, StackedConditioning
    from server.models.controls.control_kind import ControlKind
    from server.models.defaults import ModelDefaults
    from server.models.image_prompts.unet_image_prompts import UNetImagePrompts
    from server.models.references import ReferencesRead
    from server.models.text_options import TextOptions


USUAL_STEPS = 25
"""Number of steps assumed without a request, where a schedule depends on it."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about a hosted model that do not require access to its weights.

    Attributes:
        name: name that requests use.
        revision: revision of all its weights, see ``server.models.folder.Revisions``.
        denoiser: revision of its weights without the autoencoder's.
        prediction: prediction type of the denoiser.
        latent_channels: number of latent channels.
        latent_scale: pixels along one side of a latent cell.
        size_multiple: width and height in pixels must be multiples of this.
        default_width: default image width in pixels.
        default_height: default image height in pixels.
        max_tokens: maximum number of tokens of a prompt, excluding start and end markers.
        longest_side: maximum width or height in pixels for which it has positions; None where
            there is no such bound.
        embeds_scale: whether the network takes a guidance scale as input, like LCMs and FLUX.1 dev.
        reads_mask: whether the network takes the inpainting mask and the masked image as input.
        clip_skips: layers of its CLIP text encoders, counted from the last, whose hidden states the
            denoiser can be given; the first is the model's own. Empty where it reads none.
        defaults: settings of requests that leave them out; None for the server's defaults.
        vae: name of the autoencoder that replaces its own, if any.
        tiny_vae: name of the tiny autoencoder that requests may ask for, if any.
        given_denoiser: name of the file that replaces its U-Net or transformer, if any.
        references: reference images that it accepts; None where it accepts none.
    """

    name: str
    revision: str
    denoiser: str
    prediction: PredictionType
    latent_channels: int
    latent_scale: int
    size_multiple: int
    default_width: int
    default_height: int
    max_tokens: int
    longest_side: int | None = None
    embeds_scale: bool = False
    reads_mask: bool = False
    clip_skips: range = range(0)
    defaults: ModelDefaults | None = None
    vae: str | None = None
    tiny_vae: str | None = None
    given_denoiser: str | None = None
    references: ReferencesRead | None = None

    @property
    def one_prediction(self) -> bool:
        """Whether the model was distilled to be sampled without a second prediction."""
        unguided = self.defaults is not None and not self.defaults.rule.combines
        return self.embeds_scale or unguided


class HostedModel(ABC):
    """A loaded model; each family has a subclass in its own module.

    All methods except ``count_tokens`` must be called from the engine's thread.

    Attributes:
        blocks: the denoiser's compiled blocks; None where nothing is compiled.
        runs_eager: why nothing is compiled although the operator enabled compilation.
        tiny: a tiny autoencoder beside its own; None where there is none.
        weighs_prompts: whether it treats an ``EmphasizedPrompt`` differently from plain text.
    """

    weighs_prompts: ClassVar[bool] = False

    def __init__(self, facts: ModelFacts, device: torch.device, dtype: torch.dtype) -> None:
        self.facts = facts
        self.device = device
        self.dtype = dtype
        self.placement = Placement()
        self.blocks: CompiledBlocks | None = None
        self.runs_eager: str | None = None
        self.tiny: Autoencoder | None = None
        self.statistics = ModelStatistics()
        self.classifier: LatentClassifier | None = None
        self.classifier_lacks = "it has none"
        self.linear_fits = LinearFits()
        nothing = Target(facts.name, {}, None)
        self.adapters = AdapterShelf((), nothing, WeightMemory(0, "adapters"), device, dtype)
        self.embeddings = EmbeddingShelf(
            (), EmbeddingTarget(facts.name, {}, 0), WeightMemory(0, "embeddings"), device, dtype
        )
        memory = WeightMemory[Control](0, "ControlNets")
        self.controls = ControlShelf((), facts.name, None, memory, device, dtype)
        none = WeightMemory[Any](0, "IP-Adapters")
        self.image_prompts = ImagePromptShelf((), facts.name, None, none, device, dtype)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """``(C, h, w)`` of the latent of an image of the given size in pixels."""
        scale = self.facts.latent_scale
        return self.facts.latent_channels, height // scale, width // scale

    def forward_shape(
        self, width: int, height: int, references: Sequence[Tensor] = ()
    ) -> tuple[int, int, int]:
        """``(C, h, w)`` of a latent with as many cells as a forward pass reads for one row.

        Args:
            width: image width in pixels.
            height: image height in pixels.
            references: reference images, ``[3, H, W]``.
        """
        channels, h, w = self.latent_shape(width, height)
        cells = (self.latent_shape(one.shape[-1], one.shape[-2]) for one in references)
        return channels, h, w + ceil(sum(rows * columns for _, rows, columns in cells) / h)

    @property
    def default_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of the latent of an image of the model's default size."""
        return self.latent_shape(self.facts.default_width, self.facts.default_height)

    @property
    def default_schedule(self) -> NoiseSchedule:
        """The noise schedule at the default size, for measurements without a request."""
        facts = self.facts
        return self.schedule(facts.default_width, facts.default_height, USUAL_STEPS)

    @abstractmethod
    def schedule(self, width: int, height: int, steps: int) -> NoiseSchedule:
        """The noise schedule of a run; always the same object where it does not depend on the run.

        Args:
            width: image width in pixels.
            height: image height in pixels.
            steps: number of sampler steps.
        """

    def network_time(self, t: F64) -> F64:
        """The values that the network receives for times ``t``, of the shape of ``t``."""
        return self.default_schedule.conditioning(t)

    def group_key(self, width: int, height: int, length: int) -> Hashable:
        """Key that images of one latent shape must have in common to share a forward pass.

        Args:
            width: image width in pixels.
            height: image height in pixels.
            length: length of the image's longest conditioning, in tokens.
        """
        return None

    @property
    def attention(self) -> str:
        """Attention kernels of its networks; ``sdpa`` leaves the choice to torch."""
        return "sdpa"

    @property
    def memory_format(self) -> str:
        """Memory format of its denoiser's activations, by torch's name."""
        return "contiguous_format"

    @cached_property
    def gguf_types(self) -> tuple[str, ...]:
        """Block formats of its GGUF weights, that of the most weights first."""
        return tuple(kind for network in self.modules().values() for kind in kinds_of(network))

    @property
    def mixes_sizes(self) -> bool:
        """Whether rows of several latent shapes can share a forward pass (``evaluate_sizes``).

        Such a model takes no channels besides those of the latent, and has neither ControlNets nor
        a weaker companion.
        """
        return False

    def make_differentiable(self) -> None:  # noqa: B027 - most need nothing
        """Let forward-mode AD pass through ``evaluate`` from now on, at some cost in speed."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Number of tokens of a prompt, excluding markers; safe from any thread."""

    @abstractmethod
    def encode_prompts(
        self,
        prompts: Sequence[str | None],
        width: int,
        height: int,
        adapters: RowAdapters | None = None,
        options: TextOptions = AS_USUAL,
    ) -> list[Conditioning]:
        """Encode prompts to conditioning of the denoiser, one per prompt.

        Args:
            prompts: prompts; None is the unconditional as the model was trained with it: for some
                models the empty prompt, for others zeros.
            width: image width in pixels.
            height: image height in pixels.
            adapters: adapters of each prompt, with whose changes to the text encoders it is
                encoded; None where no prompt has any.
            options: options for all prompts; a family is never given an option it does not support.
        """

    def negative(self, prompt: str | None) -> str | None:
        """The text to pass to ``encode_prompts`` for a negative prompt.

        Args:
            prompt: negative prompt; None is the unconditional, and stays None.
        """
        return prompt

    def stack(self, rows: Sequence[Conditioning], *, fixed: bool = False) -> StackedConditioning:
        """Stack the conditioning of the rows of a forward pass; by default all have one shape.

        Args:
            rows: conditioning of each row.
            fixed: whether to pad to a shape that is independent of the rows' lengths, so that no
                row's bits depend on the other rows.
        """
        return stack_alike(rows)

    def equalize_lengths(
        self, texts: Mapping[TextPrompt, Conditioning]
    ) -> dict[TextPrompt, Conditioning]:
        """Bring the conditioning of one image to the lengths with which its rows are stacked.

        Args:
            texts: everything that its rows may be conditioned on.
        """
        return dict(texts)

    def add_references(self, text: Conditioning, references: Sequence[Tensor]) -> Conditioning:
        """Add reference images to the conditioning of a prompt.

        Args:
            text: conditioning of the prompt alone.
            references: clean latents ``[C, h, w]`` of images of any sizes, in the order in which
                the prompt may number them; no more than the facts allow.

        Raises:
            RuntimeError: the model accepts none; its facts say so beforehand.
        """
        raise RuntimeError(f"model {self.facts.name!r} does not read reference images")

    def inputs(
        self, prompts: Sequence[str | None], width: int | None = None, height: int | None = None
    ) -> RowInputs:
        """Inputs of rows that are conditioned on these prompts and nothing else.

        Args:
            prompts: prompts, one per row.
            width: image width in pixels; by default the model's default.
            height: image height in pixels; by default the model's default.
        """
        size = width or self.facts.default_width, height or self.facts.default_height
        return RowInputs(self.stack(self.encode_prompts(prompts, *size)))

    def channels(
        self, picture: Tensor | None, mask: Tensor | None, width: int, height: int
    ) -> Tensor | None:
        """Channels that the denoiser reads after those of an image's latent, ``[channels, h, w]``.

        Args:
            picture: initial image, ``[3, H, W]`` in [-1, 1]; None where there is none.
            mask: inpainting mask, ``[H, W]``, 1 to repaint; None to repaint everything.
            width: image width in pixels.
            height: image height in pixels.

        Returns:
            None where the denoiser reads only the latent, as most do.
        """
        return None

    def blocks_running(self, inputs: RowInputs) -> AbstractContextManager[None]:
        """Let the denoiser's blocks run compiled in a ``with`` block if all rows are plain."""
        if self.blocks is None:
            return nullcontext()
        return self.blocks.running(plain=inputs.plain)

    def in_tensors(self, inputs: RowInputs) -> RowInputs:
        """Prepare inputs so that ``evaluate`` does no more work on the host for them.

        Host data about the rows is sent to the device here, and tensors that are kept between
        forward passes are looked up. ``evaluate`` does both for inputs that are not prepared.
        """
        kind, controls, prompts = self.control_kind, inputs.controls, inputs.image_prompts
        if controls is not None and kind is not None:
            controls = controls.in_tensors(once=kind.once)
        prompts = None if prompts is None else prompts.in_tensors()
        return replace(inputs, controls=controls, image_prompts=prompts)

    @abstractmethod
    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """Run one forward pass of the denoiser.

        Args:
            x: latents ``[rows, C, h, w]`` float32.
            t: noise level in the form that the network takes, ``[rows]`` float32.
            inputs: all other inputs of the rows.

        Returns:
            The raw output ``[rows, C, h, w]`` in float32.
        """

    def evaluate_sizes(self, x: Sequence[Tensor], t: Tensor, inputs: RowInputs) -> list[Tensor]:
        """Run one forward pass of the denoiser for rows of several latent shapes.

        Args:
            x: rows of each shape, ``[rows, C, h, w]`` float32.
            t: noise levels of all rows in that order, float32, as for ``evaluate``.
            inputs: inputs of all rows in that order.

        Returns:
            The raw output for the rows of each shape, as ``evaluate`` would return it.

        Raises:
            RuntimeError: the model cannot do this; ``mixes_sizes`` says so beforehand.
        """
        raise RuntimeError(f"model {self.facts.name!r} cannot evaluate several sizes at once")

    def evaluate_weak(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """Run one forward pass of the weaker companion, for rows with the edit ``WeakModel``.

        Args:
            x: latents ``[rows, C, h, w]`` float32.
            t: noise level in the form that the network takes, ``[rows]`` float32.
            inputs: inputs of the rows, of which the companion reads only the conditioning. Adapters
                were made for another network.

        Raises:
            RuntimeError: there is none; ``refuses`` says so beforehand.
        """
        raise RuntimeError(f"model {self.facts.name!r} has no weaker companion")

    def classify(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Classify latents by the model's classifier; differentiable.

        Args:
            x: latents ``[rows, C, h, w]`` float32.
            alpha: signal scale of each row, ``[rows]``.
            sigma: noise scale of each row, 0 for clean latents, ``[rows]``.

        Returns:
            Logits ``[rows, classes]`` of each attribute.

        Raises:
            RuntimeError: there is no classifier; ``classifier_lacks`` says why.
        """
        if self.classifier is None:
            raise RuntimeError(
                f"model {self.facts.name!r} cannot classify: {self.classifier_lacks}"
            )
        return self.classifier(x, alpha, sigma)

    def modules(self) -> Mapping[str, nn.Module]:
        """The networks by their names in a model folder, for code that adapts or inspects them."""
        return {}

    def adaptable(self) -> Mapping[str, nn.Module]:
        """The networks that adapters may change, by their names in a model folder."""
        return {}

    def embedding_target(self) -> EmbeddingTarget:
        """Properties that embeddings must fit; by default prompts cannot use any."""
        return EmbeddingTarget(self.facts.name, {}, 0)

    @property
    def autoencoder(self) -> Autoencoder | None:
        """Its autoencoder, if an ``AutoencoderTiny`` may take its place.

        None where the denoiser's latents have a form that no such network makes.
        """
        return None

    @property
    def control_kind(self) -> ControlKind | None:
        """The ControlNets that its denoiser accepts; None where it accepts none."""
        return None

    @property
    def image_attention(self) -> UNetImagePrompts | None:
        """Attention of its denoiser to image prompts; None where it supports none."""
        return None

    def layers(self) -> tuple[str, ...]:
        """Names of the blocks that edits may refer to."""
        return ()

    def refuses(self, edit: Edit) -> str | None:
        """Why the model does not support an edit, as a clause; None where it does."""
        return f"cannot make {type(edit).__name__} edits"

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents ``[rows, C, h, w]`` to images ``[rows, 3, H, W]`` in [-1, 1]."""

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode images ``[rows, 3, H, W]`` in [-1, 1] to clean latents ``[rows, C, h, w]``."""

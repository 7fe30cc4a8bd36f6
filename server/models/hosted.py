"""What the engine asks of a model, whatever its family."""

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
    from server.models.blend import Told
    from server.models.classifier import LatentClassifier
    from server.models.compiling.compiled_blocks import CompiledBlocks
    from server.models.conditioning import Conditioning, StackedConditioning
    from server.models.controls.control_kind import ControlKind
    from server.models.defaults import ModelDefaults
    from server.models.image_prompts.unet_image_prompts import UNetImagePrompts
    from server.models.references import ReferencesRead
    from server.models.text_options import TextOptions


USUAL_STEPS = 25
"""Steps of a run that nothing is known of, where a schedule depends on them."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a hosted model without touching its weights.

    Attributes:
        name: as requests say it.
        revision: of all its weights, see ``server.models.folder.Revisions``.
        denoiser: of its weights without the autoencoder's.
        prediction: what the denoiser puts out.
        latent_channels: channels of a latent.
        latent_scale: pixels along one side of a latent cell.
        size_multiple: width and height in pixels must be multiples of this.
        default_width: in pixels.
        default_height: in pixels.
        max_tokens: tokens of a prompt, without the markers of start and end.
        longest_side: pixels of the longest width or height that it has positions for; None where
            there is no such bound.
        embeds_scale: whether the network is told a guidance scale, as LCMs and FLUX.1 dev are.
        reads_mask: whether the network is shown what is repainted and what is around it.
        clip_skips: layers of its CLIP text encoders, counted from the last, whose hidden states the
            denoiser can be given; the first is the model's own. Empty where it reads none.
        defaults: settings of requests that leave them out; None for the server's own.
        vae: name of the autoencoder that it was given in place of its own, if any.
        given_denoiser: name of the file of its U-Net or transformer, likewise.
        references: what it reads of pictures beside a prompt; None where it reads none.
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
    given_denoiser: str | None = None
    references: ReferencesRead | None = None

    @property
    def one_prediction(self) -> bool:
        """Whether the model was distilled to be sampled without a second prediction."""
        unguided = self.defaults is not None and not self.defaults.rule.combines
        return self.embeds_scale or unguided


class HostedModel(ABC):
    """A loaded model; one subclass a family, each in its own file.

    All methods but ``count_tokens`` belong to the engine's thread.

    Attributes:
        blocks: of the denoiser, where they are compiled; None where nothing is.
        runs_eager: why they are not, where the operator wants them compiled.
        weighs_prompts: whether it reads a ``WeightedPrompt`` as more than plain text.
    """

    weighs_prompts: ClassVar[bool] = False

    def __init__(self, facts: ModelFacts, device: torch.device, dtype: torch.dtype) -> None:
        self.facts = facts
        self.device = device
        self.dtype = dtype
        self.placement = Placement()
        self.blocks: CompiledBlocks | None = None
        self.runs_eager: str | None = None
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
        """``(C, h, w)`` of the latent of a picture of the given size in pixels."""
        scale = self.facts.latent_scale
        return self.facts.latent_channels, height // scale, width // scale

    def forward_shape(
        self, width: int, height: int, references: Sequence[Tensor] = ()
    ) -> tuple[int, int, int]:
        """``(C, h, w)`` of a latent of as many cells as a forward reads for a row of an image.

        Args:
            width: of the image in pixels.
            height: of the image in pixels.
            references: pictures that it refers to, ``[3, H, W]``.
        """
        channels, h, w = self.latent_shape(width, height)
        cells = (self.latent_shape(one.shape[-1], one.shape[-2]) for one in references)
        return channels, h, w + ceil(sum(rows * columns for _, rows, columns in cells) / h)

    @property
    def default_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of the latent of a picture of the model's own size."""
        return self.latent_shape(self.facts.default_width, self.facts.default_height)

    @property
    def default_schedule(self) -> NoiseSchedule:
        """The noise schedule at the model's own size, for what is measured without a request."""
        facts = self.facts
        return self.schedule(facts.default_width, facts.default_height, USUAL_STEPS)

    @abstractmethod
    def schedule(self, width: int, height: int, steps: int) -> NoiseSchedule:
        """The noise schedule of a run; the same object for all runs where it does not depend on it.

        Args:
            width: of the picture in pixels.
            height: of the picture in pixels.
            steps: of the sampler.
        """

    def told(self, t: F64) -> F64:
        """What the network is told at times ``t``, of the shape of ``t``."""
        return self.default_schedule.conditioning(t)

    def group_key(self, width: int, height: int, length: int) -> Hashable:
        """What images of one latent shape must have in common to share a forward.

        Args:
            width: of the picture in pixels.
            height: of the picture in pixels.
            length: of the longest conditioning of the image, in tokens.
        """
        return None

    @property
    def attention(self) -> str:
        """Which kernels its networks attend by; ``sdpa`` is torch's own choice of them."""
        return "sdpa"

    @property
    def memory_format(self) -> str:
        """How its denoiser's activations lie in memory, by torch's name for it."""
        return "contiguous_format"

    @cached_property
    def gguf_types(self) -> tuple[str, ...]:
        """In which blocks its weights are, as a GGUF file has them, that of most weights first."""
        return tuple(kind for network in self.modules().values() for kind in kinds_of(network))

    @property
    def mixes_sizes(self) -> bool:
        """Whether rows of several latent shapes can share a forward, ``evaluate_sizes``.

        Such a model reads nothing behind the channels of x, and has neither ControlNets nor a
        weaker companion.
        """
        return False

    def make_differentiable(self) -> None:  # noqa: B027 - most need nothing
        """Let torch's forward mode pass through ``evaluate`` from now on, at some speed."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, without markers; safe from any thread."""

    @abstractmethod
    def encode_prompts(
        self,
        prompts: Sequence[str | None],
        width: int,
        height: int,
        adapters: RowAdapters | None = None,
        options: TextOptions = AS_USUAL,
    ) -> list[Conditioning]:
        """Conditioning of the denoiser, one a prompt.

        Args:
            prompts: None is the unconditional, as the model was trained with it: for some the
                empty prompt, for others zeros.
            width: of the picture in pixels.
            height: of the picture in pixels.
            adapters: of each prompt, whose changes of the text encoders it is encoded with; None
                where no prompt has any.
            options: of all prompts; a family that has no use for one is never given it.
        """

    def negative(self, prompt: str | None) -> str | None:
        """The text that stands for a negative prompt among those of ``encode_prompts``.

        Args:
            prompt: None is the unconditional, and stays it.
        """
        return prompt

    def stack(self, rows: Sequence[Conditioning], *, fixed: bool = False) -> StackedConditioning:
        """The conditioning of the rows of a forward, in their order; here all are of one shape.

        Args:
            rows: of the forward.
            fixed: to a shape that does not depend on the rows' lengths, so that no row's bits
                depend on its company.
        """
        return stack_alike(rows)

    def levelled(self, texts: Mapping[Told, Conditioning]) -> dict[Told, Conditioning]:
        """The conditioning of one image in the lengths that its rows are stacked with.

        Args:
            texts: all that its rows may be told.
        """
        return dict(texts)

    def referring(self, text: Conditioning, references: Sequence[Tensor]) -> Conditioning:
        """Conditioning of a prompt that stands beside pictures.

        Args:
            text: of the prompt alone.
            references: clean latents ``[C, h, w]`` of pictures of any sizes, in the order in which
                the prompt may count them; no more than the facts say.

        Raises:
            RuntimeError: the model reads none, which its facts say beforehand.
        """
        raise RuntimeError(f"model {self.facts.name!r} reads no pictures beside a prompt")

    def inputs(
        self, prompts: Sequence[str | None], width: int | None = None, height: int | None = None
    ) -> RowInputs:
        """What rows are given that are told these prompts and nothing else.

        Args:
            prompts: one a row.
            width: of the picture in pixels; by default the model's own.
            height: of the picture in pixels; by default the model's own.
        """
        size = width or self.facts.default_width, height or self.facts.default_height
        return RowInputs(self.stack(self.encode_prompts(prompts, *size)))

    def channels(
        self, picture: Tensor | None, mask: Tensor | None, width: int, height: int
    ) -> Tensor | None:
        """What the denoiser reads behind the channels of an image's latent, ``[channels, h, w]``.

        Args:
            picture: that the image starts from, ``[3, H, W]`` in [-1, 1]; None where it has none.
            mask: of the part that is repainted, ``[H, W]``, 1 to repaint; None for all of it.
            width: of the image in pixels.
            height: of the image in pixels.

        Returns:
            None where the denoiser reads the latent alone, as most do.
        """
        return None

    def blocks_running(self, inputs: RowInputs) -> AbstractContextManager[None]:
        """Lets the denoiser's blocks run compiled in the forward inside, if all rows are plain."""
        if self.blocks is None:
            return nullcontext()
        return self.blocks.running(plain=inputs.plain)

    def in_tensors(self, inputs: RowInputs) -> RowInputs:
        """The same inputs, so prepared that the device alone does what ``evaluate`` makes of them.

        What the host says of the rows is sent to the device here, and what is kept from one forward
        to the next is looked up. ``evaluate`` does both where it has not been done.
        """
        kind, controls, prompts = self.control_kind, inputs.controls, inputs.image_prompts
        if controls is not None and kind is not None:
            controls = controls.in_tensors(once=kind.once)
        prompts = None if prompts is None else prompts.in_tensors()
        return replace(inputs, controls=controls, image_prompts=prompts)

    @abstractmethod
    def evaluate(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """One forward of the denoiser.

        Args:
            x: ``[rows, C, h, w]`` float32.
            t: what the network is told of the noise level, ``[rows]`` float32.
            inputs: all else that the rows are given.

        Returns:
            The raw output ``[rows, C, h, w]`` in float32.
        """

    def evaluate_sizes(self, x: Sequence[Tensor], t: Tensor, inputs: RowInputs) -> list[Tensor]:
        """One forward of the denoiser for rows of several latent shapes.

        Args:
            x: the rows of each shape, ``[rows, C, h, w]`` float32.
            t: of all rows in that order, float32, as for ``evaluate``.
            inputs: of all rows in that order.

        Returns:
            The raw output for the rows of each shape, as ``evaluate`` would give it.

        Raises:
            RuntimeError: the model cannot, which ``mixes_sizes`` says beforehand.
        """
        raise RuntimeError(f"model {self.facts.name!r} cannot evaluate several sizes at once")

    def evaluate_weak(self, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        """One forward of the weaker companion, for rows with the edit ``WeakModel``.

        Args:
            x: ``[rows, C, h, w]`` float32.
            t: what the network is told of the noise level, ``[rows]`` float32.
            inputs: of which the companion reads the conditioning alone. Adapters were made for
                another network.

        Raises:
            RuntimeError: there is none, which ``refuses`` says beforehand.
        """
        raise RuntimeError(f"model {self.facts.name!r} has no weaker companion")

    def classify(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """What the model's classifier makes of latents; lets gradients through.

        Args:
            x: ``[rows, C, h, w]`` float32.
            alpha: signal scale of each row, ``[rows]``.
            sigma: its noise scale, 0 for clean latents, ``[rows]``.

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
        """The networks by their names in a model folder, for what adapts or inspects them."""
        return {}

    def adaptable(self) -> Mapping[str, nn.Module]:
        """The networks that adapters may change, by their names in a model folder."""
        return {}

    def embedding_target(self) -> EmbeddingTarget:
        """What an embedding must fit that prompts may name; here they may name none."""
        return EmbeddingTarget(self.facts.name, {}, 0)

    @property
    def control_kind(self) -> ControlKind | None:
        """The ControlNets that its denoiser takes; None where it takes none."""
        return None

    @property
    def image_attention(self) -> UNetImagePrompts | None:
        """How its denoiser attends to pictures beside a prompt; None where it does not."""
        return None

    def layers(self) -> tuple[str, ...]:
        """Names of the blocks that edits may name."""
        return ()

    def refuses(self, edit: Edit) -> str | None:
        """Why the model cannot make an edit, as a clause; None where it can."""
        return f"cannot make {type(edit).__name__} edits"

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures ``[rows, 3, H, W]`` in [-1, 1] of clean latents ``[rows, C, h, w]``."""

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Clean latents ``[rows, C, h, w]`` of pictures ``[rows, 3, H, W]`` in [-1, 1]."""

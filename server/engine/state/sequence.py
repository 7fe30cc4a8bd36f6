"""The state of one image under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from server.engine.client import Flow
from server.engine.guidance_plan import plan_guidance
from server.engine.scheduler import Priority
from server.engine.state.recollection import LastEvaluation
from server.models.controls.row_controls import RowControl
from server.models.image_prompts.row_image_prompts import RowImagePrompt
from server.models.prompt_editing import at_stage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Listed

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from server.engine.guidance_plan import GuidancePlan, StagePredictions
    from server.engine.state.compiled import CompiledPlan
    from server.engine.state.lane import Lane
    from server.engine.state.submission import Submission
    from server.engine.task import ImageTask
    from server.models.blend import TextPrompt
    from server.models.conditioning import Conditioning
    from server.models.controls.control import ControlUse
    from server.models.image_prompts.image_prompt import ImagePromptKV, ImagePromptUse

__all__ = [
    "ImageResult",
    "InpaintingData",
    "Listener",
    "Sequence",
]


@dataclass(frozen=True, slots=True, eq=False)
class ImageResult:
    """A finished image.

    Attributes:
        pixels: pixels, uint8 ``[H, W, 3]``; empty if the task is undecoded.
        latents: clean latents of an undecoded task, float32 ``[C, h, w]`` on the CPU.
        evaluations: number of rows of the denoiser that it took.
        saved: number of rows that the policy saved relative to evaluating the rule's branches at
            every stage, and rows that the step cache saved.
        queue_s: seconds from submission to the first evaluation.
        denoise_s: seconds from the first evaluation to the clean latent.
        decode_s: seconds from the clean latent to the pixels.
        ancestor: for a particle, the image that it descends from; for others, the image itself.
        effective: for a particle, the effective number of images in its group at each resampling.
    """

    pixels: NDArray[np.uint8]
    evaluations: int
    saved: int
    queue_s: float
    denoise_s: float
    decode_s: float
    ancestor: int
    effective: tuple[float, ...]
    latents: Tensor | None = None


class Listener(Protocol):
    """Callbacks of a submission, in the engine's thread: must return at once and never raise."""

    def started(self, index: int) -> None:
        """Image ``index`` is about to be evaluated for the first time."""

    def progress(
        self, index: int, step: int, steps: int, preview: NDArray[np.uint8] | None
    ) -> None:
        """``step`` of ``steps`` steps are done; the preview is ``[h, w, 3]`` or None.

        The last step of a live frame is reported while it runs.
        """

    def finished(self, index: int, result: ImageResult) -> None:
        """The image is done."""

    def failed(self, index: int, error: Exception) -> None:
        """The image ended without a picture, with an error."""


@dataclass(frozen=True, slots=True, eq=False)
class InpaintingData:
    """Data of inpainting: latents and start noise ``[C, h, w]``, and where to repaint."""

    latents: Tensor
    noise: Tensor
    repaint: Tensor


@dataclass(slots=True, eq=False)
class Sequence:
    """One image under way: its task and its progress.

    Attributes:
        flow: its client, and a key of the client's images that cost the same.
        rows_at_once: number of rows of a forward pass that it needs with its group.
        conditioning: conditioning of every text that the network may be given.
        channels: extra input channels behind x, ``[channels, h, w]``; None if the network reads x
            alone.
        hints: picture of each of the task's ControlNets as it reads it, see ``ControlKind.hint``.
        shown: tokens to attend to for each of the task's image prompts.
        counted: rows that it still needs, as last counted in the backlog.
        recollection: what the task's step cache keeps of this image, if it has one.
        term_states: what each of the task's terms keeps of this image.
        ancestor: image that it descends from, if images are resampled; otherwise itself.
        effective: effective number of images in its group at each resampling.
    """

    task: ImageTask
    index: int
    listener: Listener
    submission: Submission
    guidance: GuidancePlan = field(init=False)
    flow: Flow = field(init=False)
    rows_at_once: int = field(init=False)
    stage: int = 0
    settled: bool = False
    slot: int = -1
    lane: Lane = field(init=False)
    counted: float = 0.0
    evaluations: int = 0
    saved: int = 0
    submitted_at: float = field(default_factory=monotonic)
    started_at: float = 0.0
    denoised_at: float = 0.0
    conditioning: Mapping[TextPrompt, Conditioning] = field(default_factory=dict)
    compiled: CompiledPlan | None = None
    known: InpaintingData | None = None
    channels: Tensor | None = None
    hints: tuple[Tensor, ...] = ()
    shown: tuple[ImagePromptKV, ...] = ()
    recollection: LastEvaluation = field(default_factory=LastEvaluation)
    term_states: list[Any] = field(default_factory=list[Any])
    ancestor: int = field(init=False)
    effective: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        task = self.task
        self.guidance = plan_guidance(task)
        self.rows_at_once = self.guidance.widest
        self.flow = Flow(self.submission.client, (task.model, task.width, task.height))
        self.ancestor = self.index

    @property
    def live(self) -> bool:
        """Whether it is a frame of a live stream."""
        return self.task.priority is Priority.LIVE

    @property
    def priority(self) -> Priority:
        """Priority of its task, unless its client may only have batch images."""
        demoted = self.submission.client.batch and not self.live
        return Priority.BATCH if demoted else self.task.priority

    @property
    def stream(self) -> int | None:
        """Identity of the live stream that it is a frame of; None for an ordinary image."""
        return id(self.task.stream or self.submission) if self.live else None

    def together_with(self, other: Sequence) -> bool:
        """Whether both belong to one group."""
        return self.task.group is not None and self.task.group is other.task.group

    @property
    def ask(self) -> StagePredictions:
        """Predictions that the next stage needs besides the prompt's."""
        guidance = self.guidance
        return (guidance.settled if self.settled else guidance.asks)[self.stage]

    @property
    def rows(self) -> int:
        """Number of rows of the forward pass that the next stage needs."""
        return 1 + len(self.ask.numbers)

    def controls(self, number: int) -> tuple[RowControl, ...]:
        """Return the ControlNets that act on the row of a prediction at the next stage.

        Args:
            number: number of the prediction.
        """
        if not self.hints:
            return ()
        prompted = self.guidance.pictured[number]
        return tuple(
            RowControl(use.control, hint, use.scale, use.precedence is not None)
            for use, hint in zip(self.task.controls, self.hints, strict=True)
            if self._acts(use) and use.acts_on(prompted=prompted)
        )

    def image_prompts(self, number: int) -> tuple[RowImagePrompt, ...]:
        """Return the image prompts that the row of a prediction attends to at the next stage.

        Args:
            number: number of the prediction.
        """
        if not self.shown:
            return ()
        pictured = self.guidance.pictured[number]
        return tuple(
            RowImagePrompt(shown.picture if pictured else shown.nothing, use.scale, shown.region)
            for use, shown in zip(self.task.image_prompts, self.shown, strict=True)
            if self._acts(use)
        )

    def conditioning_for(self, text: TextPrompt) -> Conditioning:
        """Return the conditioning of a text at the next stage.

        Args:
            text: text that the network may be given, maybe one that changes along the run.
        """
        return self.conditioning[at_stage(text, self.stage)]

    @property
    def inside(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of everything that changes the network at the next stage.

        These are the numbers of terms, of ControlNets, of image prompts, and of texts of edited
        prompts.
        """
        terms = tuple(acting.index for acting in self.ask.acting if acting.kind.prepares)
        texts = tuple(prompt.number(self.stage) for prompt in self.guidance.edited)
        uses_there = (
            tuple(k for k, use in enumerate(uses) if self._acts(use))
            for uses in (self.task.controls, self.task.image_prompts)
        )
        return terms, *uses_there, texts

    @property
    def may_recall(self) -> bool:
        """Whether the last evaluation has all that the next stage needs, with the same network."""
        if self.done or not self.guidance.may_recall[self.stage]:
            return False
        last = self.recollection
        return last.predictions.issuperset(self.ask.numbers) and last.inside == self.inside

    @property
    def recalls(self) -> bool:
        """Whether the next stage recalls its predictions, and evaluates none."""
        return self.recollection.recalls

    @property
    def work(self) -> float:
        """Cost of the next stage in rows of the denoiser; ControlNets count by their size."""
        acting = filter(self._acts, self.task.controls)
        return self.rows * (1 + sum(use.control.cost for use in acting))

    def _acts(self, use: ControlUse | ImagePromptUse) -> bool:
        """Whether a ControlNet or an image prompt of the task acts at the next stage."""
        return use.acts(self.stage, self.task.plan.evaluations)

    @property
    def remaining(self) -> float:
        """Cost of the remaining stages in rows of the denoiser; ControlNets count by their size.

        It assumes that guidance goes on as planned and that no stage is recalled.
        """
        guidance = self.guidance
        return (guidance.left_settled if self.settled else guidance.left)[self.stage]

    @property
    def done(self) -> bool:
        """Whether slot 0 holds the clean latent."""
        return self.stage == self.task.plan.evaluations

    @property
    def in_last_stage(self) -> bool:
        """Whether the next evaluation is the last one."""
        return self.stage + 1 == self.task.plan.evaluations

    @property
    def opens_step(self) -> bool:
        """Whether the next evaluation is the first one of its sampler step."""
        return self.task.plan.opens_step(self.stage)

    @property
    def closes_step(self) -> bool:
        """Whether the next evaluation is the last one of its sampler step."""
        return self.task.plan.closes_step(self.stage)

    def result(self, pixels: NDArray[np.uint8], latents: Tensor | None = None) -> ImageResult:
        """Make the result of the image, which ends now.

        Args:
            pixels: see :class:`ImageResult`.
            latents: see :class:`ImageResult`.
        """
        return ImageResult(
            pixels=pixels,
            evaluations=self.evaluations,
            saved=self.saved + self.recollection.saved,
            queue_s=self.started_at - self.submitted_at,
            denoise_s=self.denoised_at - self.started_at,
            decode_s=monotonic() - self.denoised_at,
            ancestor=self.ancestor,
            effective=tuple(self.effective),
            latents=latents,
        )

    def count(self) -> None:
        """Count the evaluations of the stage that has just run, and move on to the next."""
        ask = self.ask
        if self.recalls:
            self.recollection.saved += self.rows
        else:
            self.evaluations += self.rows
        self.saved += 0 if ask.evaluated else self.guidance.branches
        self.stage += 1


def units_of(sequences: Listed[Sequence]) -> list[list[Sequence]]:
    """Split images into units: single images, and groups, whose members are side by side."""
    units: list[list[Sequence]] = []
    for sequence in sequences:
        if units and units[-1][-1].together_with(sequence):
            units[-1].append(sequence)
        else:
            units.append([sequence])
    return units

"""One image under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Protocol

import numpy as np

from server.engine.selection import Priority

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from guidance import Policy, Rule
    from samplers import Plan
    from server.engine.lane import Lane

__all__ = ["ImageResult", "ImageTask", "Known", "Listener", "Priority", "Sequence", "Submission"]


@dataclass(frozen=True, slots=True, eq=False)
class ImageTask:
    """One image, as the service gives it to the engine.

    Attributes:
        model: name of a hosted model.
        prompt: what the picture shows.
        negative_prompt: what the second branch is told.
        width: in pixels.
        height: in pixels.
        seed: of this image, 0 to 2^63 - 1.
        plan: the sampler's table.
        rule: how predictions are combined.
        policy: where the second prediction comes from.
        priority: who goes first.
        image: picture to start from, ``[3, H, W]`` float32 in [-1, 1]; the plan then starts
            part way.
        mask: ``[H, W]`` float32, 1 to repaint, 0 to keep.
        previews: attach a small picture to each progress report.
    """

    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    seed: int
    plan: Plan
    rule: Rule
    policy: Policy
    priority: Priority = Priority.INTERACTIVE
    image: Tensor | None = None
    mask: Tensor | None = None
    previews: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ImageResult:
    """A finished image.

    Attributes:
        pixels: uint8 ``[H, W, 3]``.
        evaluations: rows of the denoiser that it took.
        saved: rows that the policy saved against always evaluating both branches.
        queue_s: seconds from submission to the first evaluation.
        denoise_s: seconds from there to the clean latent.
        decode_s: seconds from there to the pixels.
    """

    pixels: NDArray[np.uint8]
    evaluations: int
    saved: int
    queue_s: float
    denoise_s: float
    decode_s: float


class Listener(Protocol):
    """Who hears of a submission, in the engine's thread: must return at once and never raise."""

    def started(self, index: int) -> None:
        """Image ``index`` is about to be evaluated for the first time."""

    def progress(
        self, index: int, step: int, steps: int, preview: NDArray[np.uint8] | None
    ) -> None:
        """``step`` of ``steps`` are done; the preview is ``[h, w, 3]`` or None."""

    def finished(self, index: int, result: ImageResult) -> None:
        """The image is done."""

    def failed(self, index: int, error: Exception) -> None:
        """The image ended without a picture."""


@dataclass(slots=True, eq=False)
class Submission:
    """The images of one request; whoever holds it may cancel them, from any thread."""

    cancelled: bool = False

    def cancel(self) -> None:
        """End all that is not finished, at the next tick."""
        self.cancelled = True


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What inpainting keeps: latents and start noise ``[C, h, w]``, and where to repaint."""

    latents: Tensor
    noise: Tensor
    repaint: Tensor


@dataclass(slots=True, eq=False)
class Sequence:
    """One image under way: its task, and how far it has come."""

    task: ImageTask
    index: int
    listener: Listener
    submission: Submission
    arrived_tick: int
    guided: list[bool] = field(init=False)
    stage: int = 0
    settled: bool = False
    slot: int = -1
    lane: Lane = field(init=False)
    evaluations: int = 0
    saved: int = 0
    submitted_at: float = field(default_factory=monotonic)
    started_at: float = 0.0
    denoised_at: float = 0.0
    cond: Tensor | None = None
    uncond: Tensor | None = None
    known: Known | None = None

    def __post_init__(self) -> None:
        plan = self.task.plan
        with np.errstate(divide="ignore"):
            ratio = plan.sigma[:-1] / plan.alpha[:-1]
        progress = np.array(plan.step) / plan.steps
        self.guided = [bool(g) for g in self.task.policy.evaluates(ratio, progress)]

    @property
    def needs_other(self) -> bool:
        """Whether the next stage evaluates the second branch."""
        return self.task.rule.needs_other and not self.settled and self.guided[self.stage]

    @property
    def rows(self) -> int:
        """Rows of the forward that the next stage needs."""
        return 2 if self.needs_other else 1

    @property
    def remaining(self) -> int:
        """Evaluations still needed, if guidance goes on as planned."""
        stages = self.task.plan.evaluations - self.stage
        if self.settled or not self.task.rule.needs_other:
            return stages
        return stages + sum(self.guided[self.stage :])

    @property
    def done(self) -> bool:
        """Whether slot 0 holds the clean latent."""
        return self.stage == self.task.plan.evaluations

    @property
    def closes_step(self) -> bool:
        """Whether the next evaluation is the last one of its sampler step."""
        step = self.task.plan.step
        return self.stage + 1 == len(step) or step[self.stage + 1] != step[self.stage]

    def count(self) -> None:
        """Book the evaluations of the stage that just ran, and go on to the next."""
        self.evaluations += self.rows
        self.saved += 2 - self.rows if self.task.rule.needs_other else 0
        self.stage += 1

"""Samples of the contents of ticks, for those who watch; they reveal nothing of any prompt."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, Final, Literal, TypeAlias
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Generator
    from collections.abc import Sequence as Listed

    from server.engine.state.batch import Batch
    from server.engine.state.sequence import Sequence
    from server.engine.state.submission import Submission

__all__ = ["SAMPLE_INTERVAL_S", "RowWatch", "WovenImage", "WovenTick"]

SAMPLE_INTERVAL_S: Final = 0.2
"""Seconds between two samples."""

BranchKind: TypeAlias = Literal["prompt", "negative", "other prompt", "perturbed"]
"""What a row of the forward pass predicts."""


@dataclass(frozen=True, slots=True)
class WovenImage:
    """An image in a tick.

    Attributes:
        request: number of its request, counted from the first one that was sampled.
        image: index of the image within its request.
        timestep: timestep as given to the network.
        step: sampler step that the tick belongs to, from 1.
        steps: total number of sampler steps.
        rule: name of its guidance rule.
        policy: name of its guidance policy.
        live: whether it is a frame of a live stream.
        branches: kind of prediction of each of its rows.
    """

    request: int
    image: int
    timestep: float
    step: int
    steps: int
    rule: str
    policy: str
    live: bool
    branches: tuple[BranchKind, ...]


@dataclass(frozen=True, slots=True)
class WovenTick:
    """One forward pass.

    Attributes:
        tick: number of the tick since the engine started.
        model: name of the model that evaluated it.
        seconds: seconds that the tick took.
        waiting: number of images that were waiting or under way, but not in the tick.
        images: images whose rows it evaluated.
    """

    tick: int
    model: str
    seconds: float
    waiting: int
    images: tuple[WovenImage, ...]


class RowWatch:
    """Holds the latest sample; none is taken while nobody watches.

    Attributes:
        latest: latest sample, maybe of an earlier watch; None before the first.
        watchers: number of current watchers.
    """

    def __init__(self) -> None:
        self.latest: WovenTick | None = None
        self.watchers = 0
        self._due = 0.0
        self._lock = Lock()
        self._next = count(1)
        self._numbers: WeakKeyDictionary[Submission, int] = WeakKeyDictionary()

    @contextmanager
    def watching(self) -> Generator[None]:
        """Take samples inside the ``with`` block; safe from any thread."""
        with self._lock:
            self.watchers += 1
        try:
            yield
        finally:
            with self._lock:
                self.watchers -= 1

    def see(self, batches: Listed[Batch], tick: int, seconds: float, pending: int) -> None:
        """Sample a tick that has just run, in the engine's thread, if a sample is due.

        Args:
            batches: rows of the tick by lane; the images are still at the stage that it ran.
            tick: number of the tick.
            seconds: seconds that it took.
            pending: number of images waiting or under way, those of the tick included.
        """
        if not self.watchers or (now := monotonic()) < self._due:
            return
        self._due = now + SAMPLE_INTERVAL_S
        images = tuple(
            self._woven(sequence, plan.t[sequence.stage])
            for batch in batches
            for sequence, plan in zip(batch.sequences, batch.plans, strict=True)
        )
        self.latest = WovenTick(
            tick=tick,
            model=batches[0].lane.model.facts.name,
            seconds=seconds,
            waiting=max(0, pending - len(images)),
            images=images,
        )

    def _woven(self, sequence: Sequence, timestep: float) -> WovenImage:
        task = sequence.task
        number = self._numbers.get(sequence.submission)
        if number is None:
            number = self._numbers[sequence.submission] = next(self._next)
        return WovenImage(
            request=number,
            image=sequence.index,
            timestep=timestep,
            step=task.plan.step[sequence.stage] + 1,
            steps=task.plan.steps,
            rule=task.rule.name,
            policy=task.policy.name,
            live=sequence.live,
            branches=("prompt", *(_kind(sequence, number) for number in sequence.ask.numbers)),
        )


def _kind(sequence: Sequence, number: int) -> BranchKind:
    """The kind of a prediction other than the prompt's, by its number."""
    branches = sequence.task.rule.branches
    if number > len(branches):
        return "perturbed" if sequence.guidance.predictions[number].edits else "other prompt"
    branch = branches[number - 1]
    if branch.edit is not None:
        return "perturbed"
    return "negative" if branch.told in ("negative", "empty") else "other prompt"

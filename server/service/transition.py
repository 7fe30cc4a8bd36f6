"""From one prompt to another over some frames."""

from __future__ import annotations

from dataclasses import dataclass

from server.models.blend import Blend, BlendKind

__all__ = ["Transition"]

MOST_NESTED = 4
"""Transitions that may be under way within each other, each from where the last one was left."""


@dataclass(frozen=True, slots=True)
class Transition:
    """What each frame is told while a prompt replaces another.

    Attributes:
        target: what frames are told in the end.
        start: what they were told before; None if there is nothing to leave.
        frames: how many the change takes; the last of them is told the target alone.
        kind: how the two are mixed.
        done: frames that have been told so far.
        nested: transitions that ``start`` is in the middle of.
    """

    target: str | Blend
    start: str | Blend | None = None
    frames: int = 0
    kind: BlendKind = "linear"
    done: int = 0
    nested: int = 0

    @property
    def under_way(self) -> bool:
        """Whether the next frame is told a mixture, or is the first to be told the target."""
        return self.start is not None and self.done < self.frames

    @property
    def left(self) -> int:
        """Frames until one is told the target alone, that one included; 0 if that has been."""
        return self.frames - self.done if self.under_way else 0

    @property
    def told(self) -> str | Blend:
        """What the next frame is told."""
        return self._at(self.done + 1)

    def onward(self) -> Transition:
        """The same once the next frame has been told."""
        if not self.under_way:
            return self
        return Transition(
            self.target, self.start, self.frames, self.kind, self.done + 1, self.nested
        )

    def to(self, target: str | Blend, frames: int, kind: BlendKind) -> Transition:
        """The transition to another target, from what the last frame was told.

        Args:
            target: what frames are told in the end. If that is no other than before, a transition
                that is under way goes on at its pace.
            frames: how many the change takes.
            kind: how the two are mixed.
        """
        if target == self.target:
            return self
        if not frames:
            return Transition(target)
        if not self.under_way:
            return Transition(target, self.target, frames, kind)
        if not self.done:
            return Transition(target, self.start, frames, kind, nested=self.nested)
        if self.nested == MOST_NESTED:
            return Transition(target, self.target, frames, kind)
        return Transition(target, self._at(self.done), frames, kind, nested=self.nested + 1)

    def _at(self, done: int) -> str | Blend:
        if self.start is None or done >= self.frames:
            return self.target
        share = done / self.frames
        return Blend(((self.start, 1 - share), (self.target, share)), self.kind)

"""Transitions from one prompt to another over some frames."""

from __future__ import annotations

from dataclasses import dataclass

from server.models.blend import Blend, BlendKind

__all__ = ["Transition"]

MAX_NESTING = 4
"""Maximum depth of nested transitions, each of which starts from the middle of another."""


@dataclass(frozen=True, slots=True)
class Transition:
    """The text of each frame while a prompt replaces another.

    Attributes:
        target: text of frames in the end.
        start: text of frames before; None if there is nothing to leave.
        frames: number of frames that the change takes; the last of them has the target alone.
        kind: how the two are mixed.
        done: number of frames so far.
        nested: number of transitions that ``start`` is in the middle of.
    """

    target: str | Blend
    start: str | Blend | None = None
    frames: int = 0
    kind: BlendKind = "linear"
    done: int = 0
    nested: int = 0

    @property
    def under_way(self) -> bool:
        """Whether the next frame has a mixture, or is the first to have the target."""
        return self.start is not None and self.done < self.frames

    @property
    def left(self) -> int:
        """Number of frames up to the first with the target alone, inclusive; 0 after that."""
        return self.frames - self.done if self.under_way else 0

    @property
    def prompt(self) -> str | Blend:
        """Text of the next frame."""
        return self._at(self.done + 1)

    def onward(self) -> Transition:
        """The transition after the next frame."""
        if not self.under_way:
            return self
        return Transition(
            self.target, self.start, self.frames, self.kind, self.done + 1, self.nested
        )

    def to(self, target: str | Blend, frames: int, kind: BlendKind) -> Transition:
        """Start a transition to another target, from the text of the last frame.

        Args:
            target: text of frames in the end. If it is the same as before, a transition that is
                under way continues at its pace.
            frames: number of frames that the change takes.
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
        if self.nested == MAX_NESTING:
            return Transition(target, self.target, frames, kind)
        return Transition(target, self._at(self.done), frames, kind, nested=self.nested + 1)

    def _at(self, done: int) -> str | Blend:
        if self.start is None or done >= self.frames:
            return self.target
        share = done / self.frames
        return Blend(((self.start, 1 - share), (self.target, share)), self.kind)

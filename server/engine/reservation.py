"""A reservation of room in the queue, made before any work is done for a request."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from server.engine.state.sequence import Listener
    from server.engine.state.submission import Submission
    from server.engine.task import ImageTask

__all__ = ["Reservation"]


class Reservation:
    """Room for the images of one request; leaving its ``with`` block returns what is unused.

    It is made by ``Reception.reserve``. It is safe from any thread, so a caller that waits for the
    thread that submits may give up and release it.

    Args:
        images: number of images that there is room for.
        claim: function that claims the room that tasks need beyond their number.
        take_in: function that queues tasks in the reserved room.
        on_release: function that returns the room for a number of images.
    """

    def __init__(
        self,
        images: int,
        claim: Callable[[Sequence[ImageTask]], None],
        take_in: Callable[[Sequence[ImageTask], Listener], Submission],
        on_release: Callable[[int], None],
    ) -> None:
        self._left = images
        self._claim: Callable[[Sequence[ImageTask]], None] | None = claim
        self._take_in = take_in
        self._on_release = on_release
        self._lock = Lock()

    def claim(self, tasks: Sequence[ImageTask]) -> None:
        """Claim the room that the images need by their cost, before they are submitted.

        Args:
            tasks: all tasks of the request; their pictures need no content yet.

        Raises:
            InvalidRequest: they cost more than is ever allowed.
            Overloaded: there is no room for them now.
            ValueError: the reservation was released, so nothing would return what they cost.
        """
        with self._lock:
            if not self._left:
                raise ValueError("the reservation was released")
            if self._claim is not None:
                self._claim(tasks)
            self._claim = None

    def submit(self, tasks: Sequence[ImageTask], listener: Listener) -> Submission:
        """Queue images in the reserved room, after claiming their cost if that was not done.

        Raises:
            Overloaded: there is no room for what they cost.
            ValueError: there are more of them than there is room for, or it was released.
            NotReady: the engine has stopped or failed since.
            InvalidRequest: an image or a group needs more rows at once than a forward pass has.
        """
        with self._lock:
            if len(tasks) > self._left:
                raise ValueError(f"tasks are {len(tasks)}; room is reserved for {self._left}")
            if self._claim is not None:
                self._claim(tasks)
                self._claim = None
            submission = self._take_in(tasks, listener)
            self._left -= len(tasks)
            return submission

    def release(self) -> None:
        """Return the unused room; does nothing the second time."""
        with self._lock:
            left, self._left = self._left, 0
        if left:
            self._on_release(left)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

"""The images of one request, as shared between their submitter and the engine."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from server.engine.backlog import Holding
from server.engine.client import ANONYMOUS, Client
from server.engine.faults import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from server.models.image_prompts.image_prompt import ImagePromptKV

__all__ = ["Submission"]

Made = TypeVar("Made")


class Submission:
    """The images of one request; its holder may cancel them, from any thread.

    Each image ends exactly once. So either a cancellation or the last finished image comes first,
    and both sides learn which.

    Args:
        images: number of images.
        holding: what they occupy in the queue; by default something outside any queue.

    Attributes:
        holding: what they occupy in the queue.
        latents: latents of pictures that its images start from or refer to, by the picture's
            identity, or the error of encoding one; for the engine only.
        channels: extra input channels behind the latents of its images, by the identity of their
            mask and their size; for the engine only.
        hints: pictures of ControlNets as these read them, see ``ControlKind.hint``, by the identity
            of the use; for the engine only.
        shown: tokens of image prompts that rows attend to, by the identity of the use, or the error
            of encoding one; for the engine only.
    """

    def __init__(self, images: int, holding: Holding | None = None) -> None:
        self.holding = holding or Holding(ANONYMOUS, images)
        self.latents: dict[int, Tensor | Exception] = {}
        self.channels: dict[tuple[int, int, int], Tensor | None] = {}
        self.hints: dict[int, Tensor] = {}
        self.shown: dict[int, ImagePromptKV | Exception] = {}
        self._left = images
        self._cancelled = False
        self._lock = Lock()

    @property
    def client(self) -> Client:
        """Client that the images are for."""
        return self.holding.client

    @property
    def cancelled(self) -> bool:
        """Whether images that are not finished will end."""
        return self._cancelled

    def cancel(self) -> bool:
        """End all images that are still waiting or running, at the next tick.

        Returns:
            Whether there were any. If so, none of them will be reported as finished; if not, every
            image had ended before.
        """
        with self._lock:
            if self._left:
                self._cancelled = True
            return self._cancelled

    def finish(self) -> bool:
        """Count an image as finished, before the report; return False if it was cancelled first."""
        with self._lock:
            if not self._cancelled:
                self._left -= 1
            return not self._cancelled

    def forget_shortage(self) -> None:
        """Drop errors of pictures that did not fit into memory, so that they are encoded again."""
        self.latents = _without_shortage(self.latents)
        self.shown = _without_shortage(self.shown)

    def fail(self) -> None:
        """Count an image as ended without a picture."""
        with self._lock:
            self._left -= 1


def _without_shortage(made: Mapping[int, Made | Exception]) -> dict[int, Made | Exception]:
    return {
        key: one
        for key, one in made.items()
        if not (isinstance(one, Exception) and is_out_of_memory(one))
    }

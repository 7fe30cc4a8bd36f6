"""The stochastic similarity filter, which skips input frames that need no new output."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from server.requests.stream_schema import SimilarityFilter

__all__ = ["FrameFilter", "skip_probability"]


def skip_probability(cosine: float, threshold: float) -> float:
    """Probability of skipping a frame (Kodaira et al., arXiv 2312.12491, similarity filter).

    Args:
        cosine: cosine similarity of the frame and the last one that was processed.
        threshold: threshold below 1; at this cosine or lower, the probability is 0.
    """
    return max(0.0, 1 - (1 - cosine) / (1 - threshold))


class FrameFilter:
    """Compares each frame with the last one that was processed.

    This departs from StreamDiffusion's code: consecutive skipped frames are counted from the last
    one that was processed, for whatever reason.

    Args:
        seed: seed of the random choices.
    """

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)  # noqa: S311 - which frames are skipped is no secret
        self._last: Tensor | None = None
        self._skipped = 0

    def skips(self, frame: Tensor, settings: SimilarityFilter, *, must_run: bool = False) -> bool:
        """Whether to skip a frame; if not, later frames are compared with it.

        Args:
            frame: ``[3, H, W]`` float32 in [-1, 1].
            settings: threshold, and maximum number of consecutive skipped frames.
            must_run: whether to process it whatever it looks like.
        """
        last = self._last
        may = not must_run and self._skipped < settings.max_skip
        if may and last is not None and last.shape == frame.shape:
            cosine = torch.cosine_similarity(last.flatten(), frame.flatten(), dim=0, eps=1e-6)
            if self._random.random() < skip_probability(float(cosine), settings.threshold):
                self._skipped += 1
                return True
        self._last, self._skipped = frame, 0
        return False

    def forget(self) -> None:
        """Process the next frame whatever it looks like."""
        self._last = None

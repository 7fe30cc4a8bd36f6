"""What a tick costs: its seconds as a function of its rows, measured for as long as it runs."""

from __future__ import annotations

from bisect import bisect_right
from math import exp, log
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["MOST_ROWS", "CostModel", "TickCost", "measured"]

MOST_ROWS = 128
"""Rows of a forward where nothing else bounds them: on an H100 more gain less than 2 %."""

NODES = (1, 2, 4, 8, 16, 32, 64, MOST_ROWS)
"""Rows whose seconds are kept; those between are interpolated, and more are extrapolated."""

SAMPLED = (1, 4, 16, 64, MOST_ROWS)
"""Rows that are measured at the start."""

LONG_SAMPLE_S = 0.25
"""A forward this long is the last that is measured at the start; its ticks teach the rest."""

MOST_ROUNDS = 12
AGREEING = 6
AGREEMENT = 0.15
"""The start measures until so many samples of each size are within 15 % of what they should be."""

POLISHING = 4
"""Rounds of the median polish that takes the machine's spells out of the samples."""

LEVEL_GAIN = 0.3
"""How far one tick moves the level of all sizes: a busy spell of the machine is noticed in a few
ticks, and does not count against the size that happens to run in it."""

NODE_GAIN = 0.01
"""How far it moves the cost of its own size beside the others."""

STALE_GAIN = 0.3
"""The same for a size that had no tick for long."""

OUTLIER = log(1.5)
"""A surprise counts for no more than this."""

MIXING_KEPT = 0.998
"""Of the logarithm of what mixing costs at each tick of one size, so that half is left after 346:
what seems too dear is tried again."""

SHAPES_KEPT = 64

FIRST_TICKS = 8
"""Of a lane whose cost is a guess: its first ticks count as they are, and more."""

TEACHING_TICKS = 3
"""First ticks of such a lane, which leave an eighth of the guess's error."""


class TickCost:
    """Seconds of a tick of one lane, by its rows.

    Every tick that is observed moves the level of all sizes, as when the machine becomes busy, and
    the shape at its own size; old ticks are forgotten exponentially, and outliers count little.

    Args:
        samples: seconds by rows, at least one.
        guessed: the samples are another lane's.

    Attributes:
        mixing: how many times as long a tick takes that has smaller sizes as well, at least 1: it
            masks what fills up their rows, for which a GPU may have slower kernels, and is never
            replayed from a recording.
    """

    def __init__(self, samples: Mapping[int, float], *, guessed: bool = False) -> None:
        self.mixing = 1.0
        self._mixing_seen = 1.0
        rows, seconds = zip(*sorted(samples.items()), strict=True)
        self._seconds = [_on_line(rows, seconds, node) for node in NODES]
        self._guesses_left = FIRST_TICKS if guessed else 0
        self._ticks = 0
        # What was not measured is to be learned from the first tick that shows it.
        unseen = -STALE_GAIN / NODE_GAIN
        self._seen_at = [0.0 if guessed or node in samples else unseen for node in NODES]

    @property
    def is_guess(self) -> bool:
        """Whether it is still another lane's, as there were too few ticks of this one."""
        return self._guesses_left > FIRST_TICKS - TEACHING_TICKS

    def seconds(self, rows: int) -> float:
        """Expected seconds of a tick of so many rows, at least 1."""
        return _on_line(NODES, self._seconds, rows)

    def seconds_a_row(self, most: int) -> float:
        """The least that a row costs, in ticks of at most so many rows."""
        kept = zip(NODES, self._seconds, strict=True)
        least = min(seconds / rows for rows, seconds in kept if rows <= most)
        return least if most in NODES else min(least, self.seconds(most) / most)

    def rows_at(self, share: float, most: int) -> int:
        """Rows of the smallest tick with that share of the best throughput of ``most`` rows."""
        dearest = self.seconds_a_row(most) / share
        return next(n for n in range(1, most + 1) if self.seconds(n) <= dearest * n)

    def seconds_at(self, share: float, most: int) -> float:
        """Seconds of that tick."""
        return self.seconds(self.rows_at(share, most))

    def estimates(self) -> dict[int, float]:
        """Expected seconds by rows, at the sizes that are kept."""
        return dict(zip(NODES, self._seconds, strict=True))

    def observe(self, rows: int, seconds: float) -> float:
        """Learn from a tick that took so long.

        Returns:
            The factor by which the level of all sizes has moved, as the machine's pace has; 1 while
            the cost is a guess, whose error is its own.
        """
        self._ticks += 1
        before_s = self.seconds(rows)
        surprise = log(max(seconds, 1e-9) / before_s)
        level, guessed = LEVEL_GAIN, self._guesses_left > 0
        if guessed:
            self._guesses_left -= 1
            level = 0.5
        else:
            surprise = max(-OUTLIER, min(OUTLIER, surprise))
        for node, weight in _weights(rows):
            age = self._ticks - self._seen_at[node]
            gain = weight * min(STALE_GAIN, NODE_GAIN * age)
            level -= level * min(1.0, gain / STALE_GAIN)
            self._seconds[node] *= exp(gain * surprise)
            self._seen_at[node] += weight * age
        everywhere = exp(level * surprise)
        self.shift(everywhere)
        # Mixed ticks take what they took, which is less of what those of one size take now.
        self._mixing_seen **= MIXING_KEPT
        self.mixing = min(self._mixing_seen, max(1.0, self.mixing * before_s / self.seconds(rows)))
        return 1.0 if guessed else everywhere

    def observe_mixed(self, rows: int, seconds: float) -> float:
        """Learn from a tick that had smaller sizes as well.

        What it took longer than expected is held for the cost of mixing. If the machine is slower
        instead, mixing seems not to pay, and the ticks of one size that follow will show it.

        Returns:
            The factor by which the level of all sizes has moved: less than 1 where the tick took
            less than one of this size alone.
        """
        surprise = log(max(seconds, 1e-9) / (self.mixing * self.seconds(rows)))
        moved = self.mixing * exp(LEVEL_GAIN * max(-OUTLIER, min(OUTLIER, surprise)))
        self.mixing = self._mixing_seen = max(1.0, moved)
        everywhere = min(1.0, moved)
        self.shift(everywhere)
        return everywhere

    def correct(self, rows: int, seconds: float) -> None:
        """Believe a measurement made apart from the ticks, as where forwards take another way now.

        Args:
            rows: whose seconds are replaced if they are kept, as those of ``NODES`` are.
            seconds: of a tick of so many rows from now on.
        """
        if rows in NODES:
            self._seconds[NODES.index(rows)] = seconds

    def shift(self, factor: float) -> None:
        """Move the level of all sizes by a factor, as that of another lane has moved."""
        self._seconds = [one * factor for one in self._seconds]

    def scaled(self, factor: float) -> TickCost:
        """A guess for a lane whose pictures are so many times as large."""
        scaled = {rows: seconds * factor for rows, seconds in self.estimates().items()}
        return TickCost(scaled, guessed=True)


class CostModel:
    """Costs of ticks by model and latent shape."""

    def __init__(self) -> None:
        self._costs: dict[tuple[str, tuple[int, int, int]], TickCost] = {}
        self._measured: dict[str, tuple[int, TickCost]] = {}

    def start(self, model: str, shape: tuple[int, int, int], cost: TickCost) -> None:
        """Take the first cost of a model, at one shape."""
        self._costs[model, shape] = cost
        self._measured[model] = shape[1] * shape[2], cost

    def forget(self, model: str) -> None:
        """Drop the costs of a model."""
        del self._measured[model]
        self._costs = {key: cost for key, cost in self._costs.items() if key[0] != model}

    def of(self, model: str, shape: tuple[int, int, int]) -> TickCost:
        """The cost at a shape, or a guess by its area; asking leaves nothing behind."""
        if (known := self._costs.get((model, shape))) is not None:
            return known
        cost, larger = self._nearest(model, shape)
        return cost.scaled(larger)

    def seconds_a_row(self, model: str, shape: tuple[int, int, int], most: int) -> float:
        """:meth:`TickCost.seconds_a_row` of :meth:`of`, which every request asks for repeatedly."""
        if (known := self._costs.get((model, shape))) is not None:
            return known.seconds_a_row(most)
        cost, larger = self._nearest(model, shape)
        return larger * cost.seconds_a_row(most)

    def _nearest(self, model: str, shape: tuple[int, int, int]) -> tuple[TickCost, float]:
        """What is known of a model, and how many times as large the shape is."""
        area, cost = self._measured[model]
        return cost, shape[1] * shape[2] / area

    def keep(self, model: str, shape: tuple[int, int, int]) -> TickCost:
        """The cost at a shape that has ticks from now on, which are to teach it.

        Of other shapes the :data:`SHAPES_KEPT` last ones are remembered: those of ever new requests
        must fill neither the memory nor the metrics.
        """
        costs = dict(self._costs)
        costs[model, shape] = costs.pop((model, shape), None) or self.of(model, shape)
        firsts = [cost for _, cost in self._measured.values()]
        others = [key for key, cost in costs.items() if cost not in firsts]
        for key in others[:-SHAPES_KEPT]:
            del costs[key]
        self._costs = costs
        return costs[model, shape]

    def all(self) -> list[tuple[str, tuple[int, int, int], TickCost]]:
        """Model, latent shape and cost of all that are known."""
        return [(*key, cost) for key, cost in list(self._costs.items())]


def measured(time_of: Callable[[int], float], most: int) -> dict[int, float]:
    """Seconds by rows, from rounds of samples that agree with each other.

    In a round each size has its turn, so that a busy spell of the machine falls on all of them and
    tells of none. A sample counts where it is, beside its round, what it is in most rounds; there
    are more rounds until enough of each size do.

    Args:
        time_of: runs a forward of so many rows, and returns its seconds.
        most: rows, at least 1.

    Raises:
        MemoryError: not even one row fits.
    """
    sizes = _sizes(time_of, most)
    rounds = np.empty((0, len(sizes)))
    shape = np.zeros(len(sizes))
    while len(rounds) < MOST_ROUNDS:
        taken = [log(max(time_of(rows), 1e-9)) for rows in sizes]
        rounds = np.vstack([rounds, taken])
        shape, agree = _shape(rounds)
        if agree.sum(0).min() >= AGREEING:
            break
    levels = np.median(rounds - shape, 1)
    # Noise only ever makes a round longer.
    return dict(zip(sizes, np.exp(levels.min() + shape).tolist(), strict=True))


def _shape(rounds: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log seconds of each size beside those of the others, and which samples agree with that."""
    shape = np.median(rounds, 0)
    levels = np.median(rounds - shape, 1, keepdims=True)
    for _ in range(POLISHING):
        shape = np.median(rounds - levels, 0)
        levels = np.median(rounds - shape, 1, keepdims=True)
    agree = abs(rounds - levels - shape) < AGREEMENT
    counted = np.where(agree, rounds - levels, np.nan)
    shape[agree.any(0)] = np.nanmean(counted[:, agree.any(0)], 0)
    return shape, agree


def _sizes(time_of: Callable[[int], float], most: int) -> list[int]:
    """The sizes to measure, each having run, which warms it up and shows that it fits."""
    sizes: list[int] = []
    for rows in sorted({rows for rows in SAMPLED if rows == 1 or 2 * rows <= most} | {most}):
        try:
            # The second is warm.
            seconds = min(time_of(rows), time_of(rows))
        except MemoryError:
            if not sizes:
                raise
            break
        sizes.append(rows)
        if seconds > LONG_SAMPLE_S and len(sizes) > 1:
            break
    return sizes


def _weights(rows: int) -> tuple[tuple[int, float], tuple[int, float]]:
    """The two nodes next to a size, and how near each is, from 0 to 1."""
    after = max(1, min(bisect_right(NODES, rows), len(NODES) - 1))
    share = min(1.0, (rows - NODES[after - 1]) / (NODES[after] - NODES[after - 1]))
    return (after - 1, 1 - share), (after, share)


def _on_line(rows: Sequence[int], seconds: Sequence[float], at: int) -> float:
    """Piecewise linear, and on along the last piece; proportional where there is one point."""
    if len(rows) == 1:
        return seconds[0] * at / rows[0]
    after = max(1, min(bisect_right(rows, at), len(rows) - 1))
    before = after - 1
    slope = (seconds[after] - seconds[before]) / (rows[after] - rows[before])
    if at > rows[after]:
        # By noise the last piece may fall, and must not lead below zero.
        return seconds[after] + max(0.0, slope) * (at - rows[after])
    return seconds[before] + slope * (at - rows[before])

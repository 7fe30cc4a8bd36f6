"""Cost model: the seconds of a tick as a function of its rows, refined by every tick."""

from __future__ import annotations

from bisect import bisect_right
from math import exp, log
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["MAX_ROWS", "CostModel", "TickCost", "measured"]

MAX_ROWS = 128
"""Maximum rows of a pass if nothing else bounds them: on an H100 more gain less than 2 %."""

NODES = (1, 2, 4, 8, 16, 32, 64, MAX_ROWS)
"""Numbers of rows whose seconds are stored; others are interpolated or extrapolated."""

SAMPLED = (1, 4, 16, 64, MAX_ROWS)
"""Numbers of rows that are measured at start-up."""

LONG_SAMPLE_S = 0.25
"""A forward pass of this length is the last one measured at start-up; ticks teach the rest."""

MAX_ROUNDS = 12
AGREEING = 6
AGREEMENT = 0.15
"""Start-up measures up to ``MAX_ROUNDS`` rounds, until ``AGREEING`` samples of each size are
within 15 % of their expected value."""

POLISH_ITERATIONS = 4
"""Iterations of the median polish that removes busy spells of the machine from the samples."""

LEVEL_GAIN = 0.3
"""Gain by which one tick moves the level of all sizes. A busy spell of the machine is noticed in a
few ticks, and does not count against the size that happens to run in it."""

NODE_GAIN = 0.01
"""Gain by which one tick moves the cost of its own size relative to the others."""

STALE_GAIN = 0.3
"""Maximum of that gain, reached by a size that has had no tick for long."""

OUTLIER = log(1.5)
"""Limit on the logarithm of a tick's seconds relative to the expected ones."""

MIXING_DECAY = 0.998
"""Fraction of the logarithm of the cost of mixing that is left after each tick of one size, so that
half is left after 346 ticks: mixing that seems too expensive is tried again."""

MAX_CACHED_SHAPES = 64

FIRST_TICKS = 8
"""Number of first ticks of a lane with a guessed cost that count unclamped, and with more gain."""

TICKS_TO_UNLEARN_GUESS = 3
"""Number of first ticks of such a lane that leave an eighth of the guess's error."""


class TickCost:
    """Seconds of a tick of one lane, as a function of its rows.

    Every observed tick moves the level of all sizes, as when the machine becomes busy, and the
    shape of the curve at its own size. Old ticks are forgotten exponentially, and outliers count
    little.

    Args:
        samples: seconds by number of rows, at least one.
        guessed: whether the samples are those of another lane.

    Attributes:
        mixing: factor, at least 1, by which a tick takes longer if it has smaller sizes as well: it
            masks the padding of their rows, for which a GPU may have slower kernels, and is never
            replayed from a recording.
    """

    def __init__(self, samples: Mapping[int, float], *, guessed: bool = False) -> None:
        self.mixing = 1.0
        self._mixing_seen = 1.0
        rows, seconds = zip(*sorted(samples.items()), strict=True)
        self._seconds = [_on_line(rows, seconds, node) for node in NODES]
        self._guesses_left = FIRST_TICKS if guessed else 0
        self._ticks = 0
        # A size that was not measured is learned from the first tick that has it.
        unseen = -STALE_GAIN / NODE_GAIN
        self._seen_at = [0.0 if guessed or node in samples else unseen for node in NODES]

    @property
    def is_guess(self) -> bool:
        """Whether the cost is still that of another lane, for lack of ticks of this one."""
        return self._guesses_left > FIRST_TICKS - TICKS_TO_UNLEARN_GUESS

    def seconds(self, rows: int) -> float:
        """Expected seconds of a tick with this many rows, at least 1."""
        return _on_line(NODES, self._seconds, rows)

    def seconds_a_row(self, max_rows: int) -> float:
        """Lowest cost of a row in seconds, in ticks of at most this many rows."""
        kept = zip(NODES, self._seconds, strict=True)
        least = min(seconds / rows for rows, seconds in kept if rows <= max_rows)
        return least if max_rows in NODES else min(least, self.seconds(max_rows) / max_rows)

    def rows_at(self, share: float, max_rows: int) -> int:
        """Rows of the smallest tick with a share of the best throughput, up to ``max_rows``."""
        dearest = self.seconds_a_row(max_rows) / share
        return next(n for n in range(1, max_rows + 1) if self.seconds(n) <= dearest * n)

    def seconds_at(self, share: float, max_rows: int) -> float:
        """Expected seconds of the tick that :meth:`rows_at` returns."""
        return self.seconds(self.rows_at(share, max_rows))

    def estimates(self) -> dict[int, float]:
        """Expected seconds by number of rows, at the stored sizes."""
        return dict(zip(NODES, self._seconds, strict=True))

    def observe(self, rows: int, seconds: float) -> float:
        """Learn from a tick and the seconds that it took.

        Returns:
            The factor on the seconds of all sizes, above 1 if the machine has become slower; 1
            while the cost is a guess, since the error of the guess concerns no other lane.
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
        # Mixed ticks cost what they did, so their factor falls as the cost of one size rises.
        self._mixing_seen **= MIXING_DECAY
        self.mixing = min(self._mixing_seen, max(1.0, self.mixing * before_s / self.seconds(rows)))
        return 1.0 if guessed else everywhere

    def observe_mixed(self, rows: int, seconds: float) -> float:
        """Learn from a tick that had smaller sizes as well.

        Time beyond the expected is attributed to mixing. If it was the machine that became slower,
        mixing will seem not to pay, and the following ticks of one size will show the real cause.

        Returns:
            The factor on the seconds of all sizes: below 1 if mixed ticks turn out to take less
            time than ticks of this size alone, else 1.
        """
        surprise = log(max(seconds, 1e-9) / (self.mixing * self.seconds(rows)))
        moved = self.mixing * exp(LEVEL_GAIN * max(-OUTLIER, min(OUTLIER, surprise)))
        self.mixing = self._mixing_seen = max(1.0, moved)
        everywhere = min(1.0, moved)
        self.shift(everywhere)
        return everywhere

    def correct(self, rows: int, seconds: float) -> None:
        """Accept a measurement made outside the ticks, such as when passes begin to be replayed.

        Args:
            rows: number of rows; its seconds are replaced only if it is one of ``NODES``.
            seconds: seconds of a tick with this many rows from now on.
        """
        if rows in NODES:
            self._seconds[NODES.index(rows)] = seconds

    def shift(self, factor: float) -> None:
        """Multiply the level of all sizes by a factor, by which that of another lane has moved."""
        self._seconds = [one * factor for one in self._seconds]

    def scaled(self, factor: float) -> TickCost:
        """A guessed cost for a lane whose pictures are larger by a factor."""
        scaled = {rows: seconds * factor for rows, seconds in self.estimates().items()}
        return TickCost(scaled, guessed=True)


class CostModel:
    """Tick costs by model and latent shape."""

    def __init__(self) -> None:
        self._costs: dict[tuple[str, tuple[int, int, int]], TickCost] = {}
        self._measured: dict[str, tuple[int, TickCost]] = {}

    def start(self, model: str, shape: tuple[int, int, int], cost: TickCost) -> None:
        """Set the first cost of a model, measured at one shape."""
        self._costs[model, shape] = cost
        self._measured[model] = shape[1] * shape[2], cost

    def forget(self, model: str) -> None:
        """Drop the costs of a model."""
        del self._measured[model]
        self._costs = {key: cost for key, cost in self._costs.items() if key[0] != model}

    def of(self, model: str, shape: tuple[int, int, int]) -> TickCost:
        """The cost at a shape, or a guess by its area, which is not stored."""
        if (known := self._costs.get((model, shape))) is not None:
            return known
        cost, larger = self._nearest(model, shape)
        return cost.scaled(larger)

    def seconds_a_row(self, model: str, shape: tuple[int, int, int], max_rows: int) -> float:
        """:meth:`TickCost.seconds_a_row` of :meth:`of`, fast as every request asks often."""
        if (known := self._costs.get((model, shape))) is not None:
            return known.seconds_a_row(max_rows)
        cost, larger = self._nearest(model, shape)
        return larger * cost.seconds_a_row(max_rows)

    def _nearest(self, model: str, shape: tuple[int, int, int]) -> tuple[TickCost, float]:
        """The measured cost of a model, and the area of the shape relative to the measured one."""
        area, cost = self._measured[model]
        return cost, shape[1] * shape[2] / area

    def keep(self, model: str, shape: tuple[int, int, int]) -> TickCost:
        """Return the cost at a shape that has ticks from now on, stored so that they refine it.

        Apart from the first shape of each model, the :data:`MAX_CACHED_SHAPES` latest shapes are
        remembered. Requests with ever new shapes must fill neither the memory nor the metrics.
        """
        costs = dict(self._costs)
        costs[model, shape] = costs.pop((model, shape), None) or self.of(model, shape)
        firsts = [cost for _, cost in self._measured.values()]
        others = [key for key, cost in costs.items() if cost not in firsts]
        for key in others[:-MAX_CACHED_SHAPES]:
            del costs[key]
        self._costs = costs
        return costs[model, shape]

    def all(self) -> list[tuple[str, tuple[int, int, int], TickCost]]:
        """Model, latent shape and cost of all stored entries."""
        return [(*key, cost) for key, cost in list(self._costs.items())]


def measured(time_of: Callable[[int], float], max_rows: int) -> dict[int, float]:
    """Measure seconds by number of rows, from rounds of samples that agree with each other.

    Each round times every size once, so that a busy spell of the machine affects all of them and is
    not mistaken for the cost of one. A sample counts if its ratio to its round is about the same as
    in most rounds. There are more rounds until enough samples of each size count.

    Args:
        time_of: function that runs a forward pass of a number of rows, and returns its seconds.
        max_rows: maximum number of rows, at least 1.

    Raises:
        MemoryError: not even one row fits.
    """
    sizes = _sizes(time_of, max_rows)
    rounds = np.empty((0, len(sizes)))
    shape = np.zeros(len(sizes))
    while len(rounds) < MAX_ROUNDS:
        taken = [log(max(time_of(rows), 1e-9)) for rows in sizes]
        rounds = np.vstack([rounds, taken])
        shape, agree = _shape(rounds)
        if agree.sum(0).min() >= AGREEING:
            break
    levels = np.median(rounds - shape, 1)
    # Noise only ever makes a round longer.
    return dict(zip(sizes, np.exp(levels.min() + shape).tolist(), strict=True))


def _shape(rounds: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log seconds of each size relative to the round, and which samples agree with them."""
    shape = np.median(rounds, 0)
    levels = np.median(rounds - shape, 1, keepdims=True)
    for _ in range(POLISH_ITERATIONS):
        shape = np.median(rounds - levels, 0)
        levels = np.median(rounds - shape, 1, keepdims=True)
    agree = abs(rounds - levels - shape) < AGREEMENT
    counted = np.where(agree, rounds - levels, np.nan)
    shape[agree.any(0)] = np.nanmean(counted[:, agree.any(0)], 0)
    return shape, agree


def _sizes(time_of: Callable[[int], float], max_rows: int) -> list[int]:
    """The sizes to measure; each is run here, which warms it up and shows that it fits."""
    sizes: list[int] = []
    sampled = {rows for rows in SAMPLED if rows == 1 or 2 * rows <= max_rows}
    for rows in sorted(sampled | {max_rows}):
        try:
            # The second call is warm.
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
    """The two nodes around a number of rows, and the weight of each, from 0 to 1."""
    after = max(1, min(bisect_right(NODES, rows), len(NODES) - 1))
    share = min(1.0, (rows - NODES[after - 1]) / (NODES[after] - NODES[after - 1]))
    return (after - 1, 1 - share), (after, share)


def _on_line(rows: Sequence[int], seconds: Sequence[float], at: int) -> float:
    """Interpolate linearly, extrapolate the last segment, or scale a single point in proportion."""
    if len(rows) == 1:
        return seconds[0] * at / rows[0]
    after = max(1, min(bisect_right(rows, at), len(rows) - 1))
    before = after - 1
    slope = (seconds[after] - seconds[before]) / (rows[after] - rows[before])
    if at > rows[after]:
        # Noise may make the last segment fall, which must not lead below zero.
        return seconds[after] + max(0.0, slope) * (at - rows[after])
    return seconds[before] + slope * (at - rows[before])

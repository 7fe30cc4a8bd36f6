"""Empirical model statistics, computed from a model and samples of its data.

The recipe of arXiv 2310.13268, section 3.1 and appendix C, in the denoised prediction D. With
``m = 1 - l`` and ``y = x / alpha``,

    m  = alpha E[v * (dD/dx v)]       v of random signs (Hutchinson's diagonal)
    f  = m y - D
    f' = m' y - m (y - D) - D'        ' is d/dlam along the flow
    s  = cov(f, f') / var(f),  b = E f' - s E f

which is the paper's in other letters: along the flow ``alpha D' + sigma eps' = 0``, and written so
nothing cancels at high noise.

One departure: ' is a difference over ``lam +- reach`` along the flow, and not a derivative. A
network that was trained at whole timesteps and told of them by sines may ripple between them. On
the embedded model the derivative in t is up to four times as long as what the prediction changes
by over lam +- 0.1, and points elsewhere; a difference over 0.2 is mostly the trend.
``reach`` 0 takes derivatives, as the paper does: the flow obeys
``dy/dlam = -(sigma / alpha) eps``, so ``dx/dlam = alpha D - (1 - g) x`` with
``g = d log(alpha) / dlam``: sigma^2 on a variance-preserving schedule, sigma in flow matching, 0
where alpha is 1.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from samplers.arguments import number, whole_number
from samplers.statistics import Statistics, StatisticsIdentity, schedule_fingerprint
from samplers.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from samplers.levels import F64
    from samplers.noise_schedule import NoiseSchedule

    Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]

logger = logging.getLogger(__name__)

__all__ = ["Mixture", "SamplesDone", "along_time", "compute_statistics", "drop_checkpoint"]

LOWEST = -7.0
"""lam in place of -inf at pure noise, where y is not defined."""
REACH = 0.2
"""In lam, to either side, of differences along the flow: less than half a step of a short run."""
HALF_WINDOW = 5
"""Points to either side in the moving average of l' where derivatives are taken."""
SMALL_STEP = 1e-5
"""Of lam, and of time as a share of the schedule's range, in numerical derivatives."""
VANISHING = 1e-12
"""Share of the variances of its two terms below which var(f) is the network's rounding, and s 0."""
ROUNDING = 1e-14
"""The same of their mean squares, which cancel in variances."""
SUMS = ("vJv", "y", "D", "D'", "yy", "yD", "DD", "yD'", "DD'")


@dataclass(frozen=True, slots=True)
class Mixture:
    """A guided prediction as a sum of the model's branches.

    Attributes:
        rule: name of the guidance rule that it is.
        scale: its scale, 1 where it has none.
        weights: one a branch, summing to 1; guidance of scale w over the prompt and the
            unconditional is ``(w, 1 - w)``.
    """

    rule: str = "none"
    scale: float = 1.0
    weights: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, slots=True)
class SamplesDone:
    """``done`` of ``total`` noised samples, all points together; they include resumed ones."""

    done: int
    total: int


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over the first ``count`` samples at one point, float64 ``[sums, mixtures, C, h, w]``."""

    count: int
    sums: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Where the statistics are taken, all ``[points]``.

    Attributes:
        half_log_snr: lam, evenly rising.
        t: the schedule's time.
        alpha: signal scale.
        sigma: noise scale.
        growth: ``d log(alpha) / dlam``.
        t_slope: ``dt / dlam``.
        step: points to either side that differences are taken between; 0 for derivatives.
    """

    half_log_snr: F64
    t: F64
    alpha: F64
    sigma: F64
    growth: F64
    t_slope: F64
    step: int

    @classmethod
    def of(
        cls, schedule: NoiseSchedule, count: int, t_start: float, t_end: float, reach: float = 0.0
    ) -> Points:
        """``count`` points even in lam from ``t_start`` to ``t_end``.

        Args:
            schedule: that they lie on.
            count: of points.
            t_start: the noisiest time.
            t_end: the cleanest time.
            reach: of differences, in lam; it is rounded to whole points.
        """
        first, last = schedule.half_log_snr(np.array([t_start, t_end]))
        lam = np.linspace(first, last, count)
        # One-sided at the ends of the range, beyond which the schedule may not be defined.
        near = np.clip(np.stack([lam - SMALL_STEP, lam + SMALL_STEP]), first, last)
        times = schedule.time_of_half_log_snr(near)
        growth, t_slope = (
            (high - low) / (near[1] - near[0])
            for low, high in (np.log(schedule.level(times)[0]), times)
        )
        t = schedule.time_of_half_log_snr(lam)
        step = max(1, round(reach / (lam[1] - lam[0]))) if reach else 0
        return cls(lam, t, *schedule.level(t), growth, t_slope, step)

    def sides(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of the points below and above each: nearer ones at the ends of the range."""
        numbers = np.arange(len(self))
        return np.maximum(numbers - self.step, 0), np.minimum(numbers + self.step, len(self) - 1)

    def __len__(self) -> int:
        return len(self.t)


def along_time(schedule: NoiseSchedule, function: Callable[[F64], F64], t: Tensor) -> Tensor:
    """A schedule's numbers at the times ``t``, differentiable in forward mode.

    For denoisers given to ``compute_statistics``: alpha, sigma, and all that follows from them,
    must change with t.

    Args:
        schedule: bounds the times at which ``function`` is asked.
        function: numpy ``[rows]`` times to ``[..., rows]`` numbers.
        t: times, ``[rows]``.

    Returns:
        ``function(t)`` in the type of ``t``, with central differences as its derivative.
    """
    values, _ = _AlongTime.apply(t, schedule, function)
    return values


class _AlongTime(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(
        t: Tensor, schedule: NoiseSchedule, function: Callable[[F64], F64]
    ) -> tuple[Tensor, Tensor]:
        """The values, and their slopes for ``jvp``."""
        now = t.double().cpu().numpy()
        step = SMALL_STEP * (schedule.t_start - schedule.t_end)
        low, high = np.maximum(now - step, schedule.t_end), np.minimum(now + step, schedule.t_start)
        slopes = (function(high) - function(low)) / (high - low)
        return t.new_tensor(function(now)), t.new_tensor(slopes)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        _, slopes = output
        ctx.mark_non_differentiable(slopes)
        ctx.save_for_forward(slopes)

    @staticmethod
    @override
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * tangents[0], None


def compute_statistics(
    denoiser_of: Callable[[range], Denoise],
    schedule: NoiseSchedule,
    samples: Tensor | Callable[[range], Tensor],
    *,
    count: int,
    points: int = 120,
    model: str = "unnamed",
    mixtures: Sequence[Mixture] = (Mixture(),),
    t_start: float | None = None,
    t_end: float | None = None,
    reach: float = REACH,
    chunk: int = 16,
    seed: int = 0,
    checkpoint: Path | None = None,
    tell: Callable[[SamplesDone], None] | None = None,
) -> list[Statistics]:
    """Statistics of a model: l by forward-mode differentiation of its denoiser, s and b by a fit.

    Sample k carries the same noise and the same signs to every point, so that what is left of
    chance in l is smooth in lam, as l' and differences of f need. A sample's noise depends on the
    seed and k alone.

    Costs, a point and sample: a forward with a tangent, and two forwards a mixture. Only torch's
    own mathematics is used for attention, as its faster kernels have no forward mode; layouts
    other than contiguous ones may fail in torch's normalisations.

    Args:
        denoiser_of: from the numbers of some samples to their denoiser, which is thus free to give
            each its own prompt: ``(x [rows, C, h, w], t [rows]) -> [rows, C, h, w]``, or
            ``[branches, rows, C, h, w]`` where mixtures have several weights. It must be
            differentiable in forward mode in x; for ``reach`` 0 in t as well, the factors that
            follow from t included (``along_time`` makes them so).
        schedule: the model's, of any kind.
        samples: clean latents ``[count or more, C, h, w]`` in float32 or float64, on the device to
            compute on; or a callable that gives those of the numbers it is asked for.
        count: K, samples to use at each point, at least 2. 64 is a start, the authors take 1024
            and more.
        points: N + 1, even in lam, at least 3. The authors take 250 (Stable Diffusion) to 1200.
        model: the model's revision, for the identity.
        mixtures: guided predictions whose statistics are wanted; they share most of the cost.
        t_start: the noisiest time; by default the schedule's, or where lam is -7.
        t_end: the cleanest time; by default the schedule's.
        reach: in lam, of the differences that f' is made of, rounded to whole points; 0 for
            derivatives.
        chunk: samples in one forward, at least 1.
        seed: of noise and signs, at least 0.
        checkpoint: folder that keeps each point's sums, from which another run with the same
            arguments, or with a higher ``count``, goes on.
        tell: called after each chunk.

    Returns:
        The statistics of each mixture, elementwise.

    Raises:
        ValueError: an argument outside its range, fewer samples than ``count``, samples of another
            type or not finite, a model that predicts values that are not, or a checkpoint of
            another run.
    """
    for name, value, least in (
        ("count", count, 2),
        ("points", points, 3),
        ("chunk", chunk, 1),
        ("seed", seed, 0),
    ):
        whole_number(name, value, least)
    first = _noisiest(schedule) if t_start is None else number("t_start", t_start)
    last = schedule.t_end if t_end is None else number("t_end", t_end)
    _check(schedule, first, last, reach, mixtures)
    places = Points.of(schedule, points, first, last, reach)
    weights = [mixture.weights for mixture in mixtures]
    take = samples if callable(samples) else _taken_from(samples, count)
    shape = tuple(_checked(take(range(1)), range(1)).shape[1:])
    identities = [
        StatisticsIdentity(
            model,
            schedule_fingerprint(schedule),
            first,
            last,
            m.rule,
            m.scale,
            shape,
            count,
            points,
        )
        for m in mixtures
    ]
    store = _Store(checkpoint, _description(identities, weights, reach, seed))
    nothing = Moments(0, torch.zeros(len(SUMS), len(mixtures), *shape, dtype=torch.float64))
    all_moments: list[Moments] = []
    for index in range(points):
        moments = store.read(index, count) or nothing
        for start in range(moments.count, count, chunk):
            rows = range(start, min(start + chunk, count))
            clean = _checked(take(rows), rows)
            drawn = _noise_and_signs(rows, seed, clean)
            added = _sums(denoiser_of(rows), places, index, clean, *drawn, weights)
            moments = Moments(rows.stop, moments.sums + added)
            if tell is not None:
                tell(SamplesDone(index * count + rows.stop, points * count))
        store.write(index, moments)
        all_moments.append(moments)
    return _statistics(places, all_moments, identities)


def drop_checkpoint(folder: Path) -> None:
    """Remove the sums that :func:`compute_statistics` kept, and their folder if it is empty then.

    Args:
        folder: the checkpoint of a run whose statistics have been saved.
    """
    # With what a killed process had written half.
    for file in [*folder.glob("point-*.safetensors"), *folder.glob(".point-*.writing")]:
        file.unlink()
    with suppress(OSError):
        folder.rmdir()


def _sums(
    denoise: Denoise,
    places: Points,
    index: int,
    clean: Tensor,
    noise: Tensor,
    signs: Tensor,
    weights: Sequence[Sequence[float]],
) -> Tensor:
    """What some samples add to a point's sums."""
    alpha, sigma = float(places.alpha[index]), float(places.sigma[index])
    W = clean.new_tensor(weights)
    x = alpha * clean + sigma * noise
    t = x.new_full((len(x),), float(places.t[index]))

    def branches(x: Tensor, t: Tensor) -> Tensor:
        return denoise(x, t).view(W.shape[1], *x.shape)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        plain, along_signs = jvp(lambda x: branches(x, t), (x,), (signs,))[:2]
        D = torch.einsum("mb,b...->m...", W, plain)
        vJv = signs * torch.einsum("mb,b...->m...", W, along_signs)
        D_prime = (
            _derivative(branches, places, index, x, D, W)
            if places.step == 0
            else _difference(branches, places, index, x, D, W)
        )
    return _summed(x.double() / alpha, D.double(), D_prime.double(), vJv.double())


def _summed(y: Tensor, D: Tensor, D_prime: Tensor, vJv: Tensor) -> Tensor:
    """The sums of ``SUMS`` over the samples of a chunk; y is the same in all mixtures."""
    y = y.expand_as(D)
    parts = (vJv, y, D, D_prime, y * y, y * D, D * D, y * D_prime, D * D_prime)
    return torch.stack([part.sum(1) for part in parts]).cpu()


def _difference(
    branches: Denoise, places: Points, index: int, x: Tensor, D: Tensor, W: Tensor
) -> Tensor:
    """What D of each mixture changes by per lam, between two points on its flow."""
    sides = [int(side[index]) for side in places.sides()]
    found: list[Tensor] = []
    for end in sides:
        # The exact step with D held; what it misses is of even order, and nearly cancels.
        shrunk = float(places.sigma[end] / places.sigma[index])
        kept = float(places.alpha[end]) - shrunk * float(places.alpha[index])
        moved = shrunk * x + kept * D
        t = x.new_full((len(x),), float(places.t[end]))
        mixed = [torch.tensordot(W[k], branches(moved[k], t), 1) for k in range(len(W))]
        found.append(torch.stack(mixed))
    low, high = places.half_log_snr[sides]
    return (found[1] - found[0]) / float(high - low)


def _derivative(
    branches: Denoise, places: Points, index: int, x: Tensor, D: Tensor, W: Tensor
) -> Tensor:
    """The derivative of D of each mixture along its flow, by lam."""
    t = x.new_full((x.shape[0],), float(places.t[index]))
    flow = float(places.alpha[index]) * D - (1 - float(places.growth[index])) * x
    t_flow = torch.full_like(t, float(places.t_slope[index]))

    def pushed(flow: Tensor) -> Tensor:
        return jvp(branches, (x, t), (flow, t_flow))[1]

    # vmap shares the forward between the mixtures; not all models can be mapped, so one goes
    # without.
    along_flow = pushed(flow[0])[None] if len(W) == 1 else vmap(pushed)(flow)
    return torch.einsum("mb,mb...->m...", W, along_flow)


def _statistics(
    places: Points, moments: Sequence[Moments], identities: Sequence[StatisticsIdentity]
) -> list[Statistics]:
    """From all points' sums to l, s and b of each mixture."""
    means = np.stack([(point.sums / point.count).numpy() for point in moments], axis=1)
    alpha = places.alpha.reshape(-1, *[1] * (means.ndim - 3))
    all_statistics: list[Statistics] = []
    for index, identity in enumerate(identities):
        vJv, y, D, D_prime, yy, yD, DD, yD_prime, DD_prime = means[:, :, index]
        m = alpha * vJv
        A, B = _change(m, places)
        C_yy, C_yD, C_DD = yy - y * y, yD - y * D, DD - D * D
        C_yDp, C_DDp = yD_prime - y * D_prime, DD_prime - D * D_prime
        variance = m * m * C_yy - 2 * m * C_yD + C_DD
        covariance = m * A * C_yy + (m * B - A) * C_yD - B * C_DD - m * C_yDp + C_DDp
        least = VANISHING * (m * m * C_yy + C_DD) + ROUNDING * (m * m * yy + DD)
        s = np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > least)
        b = A * y + B * D - D_prime - s * (m * y - D)
        all_statistics.append(Statistics(places.half_log_snr, 1 - m, s, b, identity))
    return all_statistics


def _change(m: F64, places: Points) -> tuple[F64, F64]:
    """What f changes by per lam as ``f' = A y + B D - D'``: A and B, ``[points, ...]``."""
    lam = places.half_log_snr
    if places.step == 0:
        # y' = D - y, so f' = m' y + m (D - y) - D'.
        return _smoothed_derivative(m, lam) - m, m
    (m_low, m_high), (lam_low, lam_high) = ([a[side] for side in places.sides()] for a in (m, lam))
    # With D held, y - D decays as exp(-lam), from the one side to the other.
    shape = (-1, *[1] * (m.ndim - 1))
    low, high = (np.exp(lam - end).reshape(shape) for end in (lam_low, lam_high))
    width = (lam_high - lam_low).reshape(shape)
    A = (m_high * high - m_low * low) / width
    return A, (m_high - m_low) / width - A


def _smoothed_derivative(values: F64, lam: F64) -> F64:
    """Central differences over even points, smoothed by a moving average."""
    slope = np.gradient(values, lam, axis=0)
    windows = [
        slope[max(i - HALF_WINDOW, 0) : i + HALF_WINDOW + 1].mean(0) for i in range(len(lam))
    ]
    return np.stack(windows)


def _noise_and_signs(rows: range, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Unit noise and random signs of each sample, whatever the point, the chunk and the device."""
    noise, signs = [], []
    for k in rows:
        rng = np.random.default_rng((seed, k))
        noise.append(rng.standard_normal(like.shape[1:]))
        signs.append(2.0 * rng.integers(2, size=like.shape[1:]) - 1)
    return like.new_tensor(np.stack(noise)), like.new_tensor(np.stack(signs))


def _noisiest(schedule: NoiseSchedule) -> float:
    lam = schedule.half_log_snr(np.array(schedule.t_start))
    if np.isfinite(lam):
        return schedule.t_start
    return float(schedule.time_of_half_log_snr(np.array(LOWEST)))


def _check(
    schedule: NoiseSchedule,
    t_start: float,
    t_end: float,
    reach: float,
    mixtures: Sequence[Mixture],
) -> None:
    lam = schedule.half_log_snr(np.array([t_start, t_end]))
    if not schedule.t_start >= t_start > t_end >= 0 or not np.isfinite(lam).all():
        raise ValueError(
            f"t_start is {t_start:g} and t_end is {t_end:g}; statistics go from at most "
            f"{schedule.t_start:g} down to a lower time, with signal at the one and noise at the "
            "other."
        )
    if not 0 <= number("reach", reach) < np.inf:
        raise ValueError(f"reach is {reach:g}; it must be finite and at least 0.")
    if not mixtures:
        raise ValueError("mixtures is empty; at least one is needed.")
    for mixture in mixtures:
        if len(mixture.weights) != len(mixtures[0].weights) or abs(sum(mixture.weights) - 1) > 1e-9:
            raise ValueError(
                f"mixtures has the weights {mixture.weights}; they must sum to 1, and all have "
                "one weight a branch."
            )


def _taken_from(samples: Tensor, count: int) -> Callable[[range], Tensor]:
    if len(samples) < count:
        raise ValueError(
            f"count is {count}; samples holds {len(samples)} latents, which is the most."
        )
    return lambda rows: samples[rows.start : rows.stop]


def _checked(clean: Tensor, rows: range) -> Tensor:
    """The samples of these numbers, unless they are not what was asked for."""
    if len(clean) != len(rows):
        raise ValueError(
            f"samples gave {len(clean)} latents for the numbers {rows.start} to {rows.stop - 1}; "
            "it must give one for each."
        )
    if clean.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"samples is of type {clean.dtype}; it must be float32 or float64.")
    if not clean.isfinite().all():
        raise ValueError("samples has values that are not finite.")
    return clean


def _description(
    identities: Sequence[StatisticsIdentity],
    weights: Sequence[Sequence[float]],
    reach: float,
    seed: int,
) -> str:
    """All that sums depend on, but for the number of samples."""
    described = [asdict(identity) | {"samples": None} for identity in identities]
    return json.dumps([described, weights, reach, seed])


class _Store:
    """Each point's sums in a file of its own, in a folder that may be none."""

    def __init__(self, folder: Path | None, description: str) -> None:
        self._folder = folder
        self._description = description

    def read(self, index: int, most: int) -> Moments | None:
        """What an earlier run summed up at a point; None if that cannot be read.

        Raises:
            ValueError: it was another run, or used more than ``most`` samples.
        """
        if self._folder is None or not (file := self._file(self._folder, index)).exists():
            return None
        try:
            with safe_open(file, "pt") as content:
                metadata: dict[str, str] = content.metadata() or {}
                sums = content.get_tensor("sums")
            description, count = metadata["description"], int(metadata["count"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("%s cannot be read and is computed again: %s", file, error)
            return None
        if description != self._description:
            raise ValueError(
                f"checkpoint {str(self._folder)!r} is of another run; remove it or name another."
            )
        if count > most:
            raise ValueError(
                f"samples is {most}, and checkpoint {str(self._folder)!r} holds {count}; ask for "
                "at least as many, or name another."
            )
        return Moments(count, sums)

    def write(self, index: int, moments: Moments) -> None:
        """Keep a point's sums, whole or not at all."""
        if self._folder is None:
            return
        metadata = {"description": self._description, "count": str(moments.count)}
        content = save({"sums": moments.sums}, metadata)
        write_whole(self._file(self._folder, index), content)

    @staticmethod
    def _file(folder: Path, index: int) -> Path:
        return folder / f"point-{index:05}.safetensors"

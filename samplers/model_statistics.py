"""Empirical model statistics, computed from a model and samples of its data.

The method of arXiv 2310.13268, section 3.1 and appendix C, for the denoised prediction D. With
``m = 1 - l`` and ``y = x / alpha``,

    m  = alpha E[v * (dD/dx v)]       v of random signs (Hutchinson's diagonal)
    f  = m y - D
    f' = m' y - m (y - D) - D'        ' is d/dlam along the flow
    s  = cov(f, f') / var(f),  b = E f' - s E f

which equals the paper's formulas, since ``alpha D' + sigma eps' = 0`` along the flow; in this form
nothing cancels at high noise.

One departure: ' is a difference over ``lam +- reach`` along the flow and not a derivative. A
network that was trained at whole timesteps, embedded as sines, may ripple between them. On the
embedded model the derivative in t is up to four times as long as the change of the prediction over
lam +- 0.1, and points in another direction; a difference over 0.2 is mostly the trend.

``reach`` 0 takes derivatives, as in the paper: the flow obeys
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

MIN_LAM = -7.0
"""lam used in place of -inf at pure noise, where y is undefined."""
REACH = 0.2
"""Reach in lam, to either side, of differences along the flow: under half a step of a short run."""
HALF_WINDOW = 5
"""Points to either side in the moving average of l', used where derivatives are taken."""
SMALL_STEP = 1e-5
"""Step of numerical derivatives: in lam, and in time as a fraction of the schedule's range."""
VANISHING = 1e-12
"""Fraction of the variances of its two terms below which var(f) is rounding, and s is set to 0."""
ROUNDING = 1e-14
"""The same as a fraction of their mean squares, which cancel in variances."""
SUMS = ("vJv", "y", "D", "D'", "yy", "yD", "DD", "yD'", "DD'")


@dataclass(frozen=True, slots=True)
class Mixture:
    """A guided prediction as a weighted sum of the model's branches.

    A branch is one prediction of the model, such as that for the prompt.

    Attributes:
        rule: name of the guidance rule that the mixture represents.
        scale: guidance scale, 1 where the rule has none.
        weights: one weight per branch, summing to 1; guidance with scale w over the prompt and the
            unconditional branch is ``(w, 1 - w)``.
    """

    rule: str = "none"
    scale: float = 1.0
    weights: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, slots=True)
class SamplesDone:
    """Progress: ``done`` of ``total`` noised samples over all points, including resumed ones."""

    done: int
    total: int


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over the first ``count`` samples at one point, float64 ``[sums, mixtures, C, h, w]``."""

    count: int
    sums: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """The points where statistics are taken; all arrays are ``[points]``.

    Attributes:
        half_log_snr: lam, evenly spaced and increasing.
        t: time of the schedule.
        alpha: signal scale.
        sigma: noise scale.
        growth: ``d log(alpha) / dlam``.
        t_slope: ``dt / dlam``.
        step: reach of differences, in points to either side; 0 for derivatives.
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
            schedule: schedule that the points lie on.
            count: number of points.
            t_start: the noisiest time.
            t_end: the cleanest time.
            reach: reach of differences, in lam; rounded to whole points.
        """
        first, last = schedule.half_log_snr(np.array([t_start, t_end]))
        lam = np.linspace(first, last, count)
        # One-sided at the ends of the range, beyond which the schedule may be undefined.
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
        """Indices of the points below and above each: nearer ones at the ends of the range."""
        numbers = np.arange(len(self))
        return np.maximum(numbers - self.step, 0), np.minimum(numbers + self.step, len(self) - 1)

    def __len__(self) -> int:
        return len(self.t)


def along_time(schedule: NoiseSchedule, function: Callable[[F64], F64], t: Tensor) -> Tensor:
    """Numbers of a schedule at the times ``t``, differentiable in forward mode.

    For denoisers passed to ``compute_statistics``, in which alpha, sigma and everything derived
    from them must depend on t differentiably.

    Args:
        schedule: bounds the times at which ``function`` is evaluated.
        function: maps numpy times ``[rows]`` to numbers ``[..., rows]``.
        t: times, ``[rows]``.

    Returns:
        ``function(t)`` in the dtype of ``t``, with central differences as its derivative.
    """
    values, _ = _DifferentiableTime.apply(t, schedule, function)
    return values


class _DifferentiableTime(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(
        t: Tensor, schedule: NoiseSchedule, function: Callable[[F64], F64]
    ) -> tuple[Tensor, Tensor]:
        """The values, and their derivatives for ``jvp``."""
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

    Sample k has the same noise and the same random signs at every point, so that the remaining
    sampling error of l is smooth in lam, as l' and differences of f require. The noise of a sample
    depends only on the seed and k.

    Cost per point and sample: one forward pass with a tangent, and two forward passes per mixture.
    Attention uses torch's MATH backend only, as the faster kernels do not support forward mode;
    non-contiguous layouts may fail in torch's normalisations.

    Args:
        denoiser_of: maps the indices of some samples to their denoiser, which can thus give each
            sample its own prompt: ``(x [rows, C, h, w], t [rows]) -> [rows, C, h, w]``, or
            ``[branches, rows, C, h, w]`` where mixtures have several weights. It must be
            differentiable in forward mode in x; for ``reach`` 0 also in t, including the factors
            that follow from t (``along_time`` makes them so).
        schedule: noise schedule of the model, of any kind.
        samples: clean latents ``[count or more, C, h, w]`` in float32 or float64, on the device to
            compute on; or a callable that returns the latents of the indices it is given.
        count: K, number of samples to use at each point, at least 2. 64 is a start; the authors
            use 1024 and more.
        points: N + 1, number of points, evenly spaced in lam, at least 3. The authors use 250
            (Stable Diffusion) to 1200.
        model: revision of the model, for the identity.
        mixtures: guided predictions to compute statistics for; they share most of the cost.
        t_start: the noisiest time; by default the schedule's, or where lam is -7.
        t_end: the cleanest time; by default the schedule's.
        reach: reach in lam of the differences from which f' is computed, rounded to whole points;
            0 for derivatives.
        chunk: number of samples in one forward pass, at least 1.
        seed: seed of noise and signs, at least 0.
        checkpoint: folder that keeps the sums of each point; another run with the same arguments,
            or with a higher ``count``, continues from them.
        tell: called with the progress after each chunk.

    Returns:
        The statistics of each mixture, elementwise.

    Raises:
        ValueError: an argument is outside its range, there are fewer samples than ``count``,
            samples have another dtype or are not finite, the model's predictions are not finite,
            or the checkpoint belongs to another run.
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
    """Remove the sums that :func:`compute_statistics` kept, and their folder if it is then empty.

    Args:
        folder: checkpoint of a run whose statistics have been saved.
    """
    # Including files that a killed process left half written.
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
    """The contribution of some samples to the sums of a point."""
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
    """The change of D of each mixture per unit of lam, between two points on its flow."""
    sides = [int(side[index]) for side in places.sides()]
    found: list[Tensor] = []
    for end in sides:
        # The exact step for constant D; its error is of even order and nearly cancels.
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
    """The derivative of D of each mixture along its flow, with respect to lam."""
    t = x.new_full((x.shape[0],), float(places.t[index]))
    flow = float(places.alpha[index]) * D - (1 - float(places.growth[index])) * x
    t_flow = torch.full_like(t, float(places.t_slope[index]))

    def pushed(flow: Tensor) -> Tensor:
        return jvp(branches, (x, t), (flow, t_flow))[1]

    # vmap shares the forward pass between the mixtures. Not all models support vmap, so a single
    # mixture does without it.
    along_flow = pushed(flow[0])[None] if len(W) == 1 else vmap(pushed)(flow)
    return torch.einsum("mb,mb...->m...", W, along_flow)


def _statistics(
    places: Points, moments: Sequence[Moments], identities: Sequence[StatisticsIdentity]
) -> list[Statistics]:
    """Compute l, s and b of each mixture from the sums of all points."""
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
    """A and B of the change of f per unit of lam, ``f' = A y + B D - D'``; ``[points, ...]``."""
    lam = places.half_log_snr
    if places.step == 0:
        # y' = D - y, so f' = m' y + m (D - y) - D'.
        return _smoothed_derivative(m, lam) - m, m
    (m_low, m_high), (lam_low, lam_high) = ([a[side] for side in places.sides()] for a in (m, lam))
    # With constant D, y - D decays as exp(-lam) from one side to the other.
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
    """Unit noise and random signs of each sample, independent of point, chunk and device."""
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
    return float(schedule.time_of_half_log_snr(np.array(MIN_LAM)))


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
                f"mixtures has the weights {mixture.weights}; they must sum to 1, with one weight "
                "for each branch."
            )


def _taken_from(samples: Tensor, count: int) -> Callable[[range], Tensor]:
    if len(samples) < count:
        raise ValueError(
            f"count is {count}; at most {len(samples)}, the number of latents in samples, is "
            "allowed."
        )
    return lambda rows: samples[rows.start : rows.stop]


def _checked(clean: Tensor, rows: range) -> Tensor:
    """Check that the samples of these indices are as requested, and return them."""
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
    """Everything that the sums depend on except the number of samples."""
    described = [asdict(identity) | {"samples": None} for identity in identities]
    return json.dumps([described, weights, reach, seed])


class _Store:
    """The sums of each point in a file of its own; without a folder, nothing is stored."""

    def __init__(self, folder: Path | None, description: str) -> None:
        self._folder = folder
        self._description = description

    def read(self, index: int, most: int) -> Moments | None:
        """The sums of an earlier run at a point; None if there are none or they cannot be read.

        Raises:
            ValueError: they belong to another run, or used more than ``most`` samples.
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
                f"checkpoint {str(self._folder)!r} belongs to another run; remove it or choose "
                "another."
            )
        if count > most:
            raise ValueError(
                f"samples is {most}, but checkpoint {str(self._folder)!r} holds {count}; use at "
                "least as many samples, or another checkpoint."
            )
        return Moments(count, sums)

    def write(self, index: int, moments: Moments) -> None:
        """Store the sums of a point atomically."""
        if self._folder is None:
            return
        metadata = {"description": self._description, "count": str(moments.count)}
        content = save({"sums": moments.sums}, metadata)
        write_whole(self._file(self._folder, index), content)

    @staticmethod
    def _file(folder: Path, index: int) -> Path:
        return folder / f"point-{index:05}.safetensors"

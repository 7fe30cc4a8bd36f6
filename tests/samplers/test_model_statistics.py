"""Statistics computed from a denoiser, compared with closed forms and with the exact flow."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import samplers
from samplers import NoiseSchedule
from samplers.gaussian import GaussianDenoiser, GaussianMixtureDenoiser
from samplers.model_statistics import (
    HALF_WINDOW,
    Mixture,
    Points,
    SamplesDone,
    _noise_and_signs,
    along_time,
    compute_statistics,
)
from samplers.statistics import schedule_fingerprint
from tests.covering import covering
from tests.samplers.cases import DISCRETE, EDM, FLOW, SCHEDULES, VP, each_schedule

MU, C = 0.7, 0.6
SHAPE = (2, 3, 3)

Denoise = Callable[[Tensor, Tensor], Tensor]
Denoisers = Callable[[range], Denoise]


def gaussian(schedule: NoiseSchedule, mean: float = MU) -> Denoise:
    """The exact denoiser of N(mean, C^2), differentiable in time."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = levels(schedule, t)
        variance = alpha**2 * C**2 + sigma**2
        # Each operation on x takes a millisecond under forward differentiation: there are two.
        return sigma**2 * mean / variance + (alpha * C**2 / variance) * x

    return denoise


def for_all(denoise: Denoise) -> Denoisers:
    """The same denoiser for all samples."""
    return lambda _: denoise


def levels(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    both = along_time(schedule, lambda t: np.stack(schedule.level(t)), t)
    alpha, sigma = both[:, :, None, None, None]
    return alpha, sigma


def drawn(count: int) -> Tensor:
    rng = np.random.default_rng(1)
    return torch.from_numpy(MU + C * rng.standard_normal((count, *SHAPE)))


@pytest.mark.parametrize(
    ("name", "reach"),
    covering(product(["linear", "flow_shifted", "edm"], [0.2, 0.0]), tuple),
)
def test_a_gaussian_gives_its_closed_form(name: str, reach: float) -> None:
    schedule = SCHEDULES[name]
    # Derivatives are averaged over a window of points, which must lie close together.
    points = 80 if reach else 160
    (found,) = compute_statistics(
        for_all(gaussian(schedule)), schedule, drawn(8), count=8, points=points, reach=reach
    )
    rise = C**2 * np.exp(2 * found.half_log_snr)[:, None, None, None]
    exact = 1 / (1 + rise)
    l_slope = -2 * rise * exact**2
    assert np.abs(found.l - exact).max() < 1e-11
    assert np.abs(found.s).max() < 0.02
    # Differences and moving averages flatten the peak of l', which is 1/2, the more so the wider
    # the range of the points is: by 0.045 for flow matching.
    assert np.abs(found.b + l_slope * MU).max() < (0.01 if reach else 0.05)
    assert found.identity is not None
    assert found.identity.schedule == schedule_fingerprint(schedule)
    assert (found.identity.rule, found.identity.scale) == ("none", 1.0)
    assert (found.identity.samples, found.identity.points) == (8, points)


def test_hutchinson_finds_the_diagonal_of_a_linear_denoiser() -> None:
    rng = np.random.default_rng(0)
    size = int(np.prod(SHAPE))
    matrix = torch.from_numpy(rng.standard_normal((size, size)) / size**0.5)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return (x.flatten(1) @ matrix.T).view(x.shape)

    (found,) = compute_statistics(
        for_all(denoise), VP, drawn(4096), count=4096, points=3, chunk=4096
    )
    alpha = VP.level(VP.time_of_half_log_snr(found.half_log_snr))[0][:, None]
    exact = 1 - alpha * matrix.diag().numpy()
    # The error of an element is the norm of its row's other entries divided by sqrt(4096).
    assert np.abs(found.l.reshape(3, -1) - exact).max() < 4 / 64


@dataclass
class Mixed:
    """Statistics of a Gaussian mixture, and the exact flow to compare them with."""

    schedule: NoiseSchedule
    exact: GaussianMixtureDenoiser
    found: samplers.Statistics
    clean: Tensor
    noise: Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule, reach: float, count: int = 40, points: int = 61) -> Mixed:
        exact = GaussianMixtureDenoiser(schedule)
        weights, means, deviations = (
            torch.tensor(part, dtype=torch.float64)
            for part in (exact.weights, exact.means, exact.deviations)
        )

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = (part[..., None] for part in levels(schedule, t))
            variance = (alpha * deviations) ** 2 + sigma**2
            score = (x[..., None] - alpha * means) ** 2 / variance
            share = torch.softmax(weights.log() - (variance.log() + score) / 2, -1)
            inner = (sigma**2 * means + alpha * deviations**2 * x[..., None]) / variance
            return (share * inner).sum(-1)

        clean = drawn(count)
        (found,) = compute_statistics(
            for_all(denoise),
            schedule,
            clean,
            count=count,
            points=points,
            reach=reach,
            chunk=count,
        )
        noise, _ = _noise_and_signs(range(count), 0, clean)
        return cls(schedule, exact, found, clean, noise)

    def f(self, i: int, distance: float, m: np.ndarray) -> np.ndarray:
        """f of all samples of point i, transported by a distance in lam along the exact flow."""
        lam = self.found.half_log_snr[i]
        t, to = (self._time(lam + d) for d in (0.0, distance))
        (alpha, sigma), (alpha_to, _) = (self.schedule.level(np.array(time)) for time in (t, to))
        x = self.exact.transport(float(alpha) * self.clean + float(sigma) * self.noise, t, to)
        return m * x.numpy() / float(alpha_to) - self.exact(x, to).numpy()

    def check(self, i: int, change: np.ndarray, tolerance: float) -> None:
        """Compare s and b at point i with numpy's linear fit of the change of f."""
        f = self.f(i, 0.0, 1 - self.found.l[i])
        for place in np.ndindex(*SHAPE):
            s, b = np.polyfit(f[:, *place], change[:, *place], 1)
            assert self.found.s[i][place] == pytest.approx(s, abs=tolerance, rel=tolerance)
            assert self.found.b[i][place] == pytest.approx(b, abs=tolerance, rel=tolerance)

    def _time(self, lam: float) -> float:
        return float(self.schedule.time_of_half_log_snr(np.array(lam)))


each_kind = pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])


@each_kind
def test_derivatives_along_the_flow_are_those_of_the_exact_flow(schedule: NoiseSchedule) -> None:
    mixed, h = Mixed.of(schedule, reach=0.0, points=31), 1e-4
    m = 1 - mixed.found.l
    slope = np.gradient(m, mixed.found.half_log_snr, axis=0)
    for i in range(HALF_WINDOW, len(m) - HALF_WINDOW, 7):
        m_slope = slope[i - HALF_WINDOW : i + HALF_WINDOW + 1].mean(0)
        high, low = mixed.f(i, h, m[i] + h * m_slope), mixed.f(i, -h, m[i] - h * m_slope)
        mixed.check(i, (high - low) / (2 * h), 2e-4)


@each_kind
def test_differences_along_the_flow_are_those_of_the_exact_flow(schedule: NoiseSchedule) -> None:
    """Between the same points; the remaining error is from the step with constant D."""
    mixed = Mixed.of(schedule, reach=0.2)
    m, lam = 1 - mixed.found.l, mixed.found.half_log_snr
    reach = lam[1] - lam[0]
    assert 0.15 < reach < 0.25
    for i in range(7, len(m) - 1, 13):
        high, low = mixed.f(i, reach, m[i + 1]), mixed.f(i, -reach, m[i - 1])
        mixed.check(i, (high - low) / (2 * reach), 0.02)


def test_a_ripple_in_time_spoils_derivatives_and_not_differences() -> None:
    """The ripple is like that of a network between the timesteps that it was trained at."""

    def rippled(x: Tensor, t: Tensor) -> Tensor:
        wave = along_time(DISCRETE, lambda t: np.sin(2 * np.pi * t), t)[:, None, None, None]
        return gaussian(DISCRETE)(x, t) + 0.01 * wave

    def b_of(denoise: Denoise, reach: float) -> np.ndarray:
        (found,) = compute_statistics(
            for_all(denoise), DISCRETE, drawn(16), count=16, points=40, reach=reach
        )
        return found.b

    moved, spoilt = (
        np.abs(b_of(rippled, reach) - b_of(gaussian(DISCRETE), reach)).max() for reach in (0.2, 0.0)
    )
    assert moved < 0.06
    assert spoilt > 2


@each_schedule
def test_x_moves_as_the_flow_does_at_every_point(schedule: NoiseSchedule) -> None:
    top = float(np.maximum(schedule.half_log_snr(np.array(schedule.t_start)), -7))
    start = float(schedule.time_of_half_log_snr(np.array(top)))
    places = Points.of(schedule, 9, start, schedule.t_end)
    alpha, sigma = schedule.level(places.t)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    exact = GaussianDenoiser(schedule, MU, C)
    for i in range(1, 8):
        h = 1e-4
        low, t, high = (
            float(schedule.time_of_half_log_snr(places.half_log_snr[i] + d)) for d in (-h, 0, h)
        )
        moved = (exact.transport(x, t, high) - exact.transport(x, t, low)) / (2 * h)
        claimed = alpha[i] * exact(x, t) - (1 - places.growth[i]) * x
        assert torch.allclose(claimed, moved, atol=1e-6)
    # If the kind of the schedule is known, so is the growth, including the ends.
    known = {"FlowMatching": sigma, "EDM": np.zeros(9)}.get(type(schedule).__name__, sigma**2)
    assert np.allclose(places.growth, known, atol=1e-4)


def test_time_moves_with_lam() -> None:
    places = Points.of(EDM, 7, 80.0, 0.002)
    assert np.allclose(places.t_slope, -places.t, rtol=1e-4)


@pytest.mark.parametrize("t", [0.0, 0.5, 998.7, 999.0])
def test_derivatives_in_time_are_one_sided_at_the_ends_of_training(t: float) -> None:
    given = torch.tensor([t], dtype=torch.float64)
    value, slope = torch.func.jvp(
        lambda t: along_time(DISCRETE, lambda t: DISCRETE.level(t)[0], t),
        (given,),
        (torch.ones_like(given),),
    )[:2]
    k = min(int(t), 998)
    logs = DISCRETE.log_alphas  # type: ignore[attr-defined]
    assert value.item() == pytest.approx(DISCRETE.level(np.array(t))[0])
    assert slope.item() == pytest.approx(value.item() * (logs[k + 1] - logs[k]), rel=1e-4)


@pytest.mark.parametrize("reach", [0.2, 0.0])
def test_mixtures_of_branches_are_the_statistics_of_their_sums(reach: float) -> None:
    first, second = gaussian(VP, MU), gaussian(VP, -MU)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([first(x, t) * x.cos(), second(x, t)])

    mixtures = [Mixture(weights=(1, 0)), Mixture("cfg", 4.0, (4, -3)), Mixture("cfg", 2, (2, -1))]
    given: dict[str, Any] = {"count": 8, "points": 12, "reach": reach}
    together = compute_statistics(for_all(denoise), VP, drawn(8), mixtures=mixtures, **given)
    for mixture, found in zip(mixtures, together, strict=True):
        w, u = mixture.weights

        def summed(x: Tensor, t: Tensor, w: float = w, u: float = u) -> Tensor:
            cond, uncond = denoise(x, t)
            return w * cond + u * uncond

        (alone,) = compute_statistics(for_all(summed), VP, drawn(8), **given)
        for name in ("l", "s", "b"):
            assert np.allclose(getattr(found, name), getattr(alone, name), rtol=1e-8, atol=1e-8)
        assert found.identity is not None
        assert (found.identity.rule, found.identity.scale) == (mixture.rule, mixture.scale)


def test_each_sample_is_denoised_as_its_own() -> None:
    """Samples of two kinds, each with its own denoiser, requested by index."""
    asked: list[range] = []

    def denoiser_of(rows: range) -> Denoise:
        asked.append(rows)
        means = torch.tensor([MU if k % 2 else -MU for k in rows])[:, None, None, None]

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return gaussian(VP, 0.0)(x, t) + means * gaussian(VP, 1.0)(torch.zeros_like(x), t)

        return denoise

    clean = drawn(10)
    (found,) = compute_statistics(denoiser_of, VP, clean, count=10, points=4, chunk=4)
    assert asked == [range(4), range(4, 8), range(8, 10)] * 4
    (called,) = compute_statistics(
        denoiser_of, VP, lambda rows: clean[rows.start : rows.stop], count=10, points=4, chunk=3
    )
    assert np.allclose(called.b, found.b, rtol=1e-9, atol=1e-12)


class Stopped(Exception):
    """Ends a run part way."""


def test_a_stopped_run_goes_on_to_the_same_result(tmp_path: Path, mode_of_files: int) -> None:
    def run(count: int, folder: Path | None, stop_at: int | None = None) -> samplers.Statistics:
        def tell(progress: SamplesDone) -> None:
            told.append(progress)
            if progress.done == stop_at:
                raise Stopped

        (found,) = compute_statistics(
            for_all(gaussian(VP)),
            VP,
            drawn(24),
            count=count,
            points=5,
            chunk=8,
            checkpoint=folder,
            tell=tell,
        )
        return found

    told: list[SamplesDone] = []
    whole = run(24, None)
    assert told[-1] == SamplesDone(120, 120)
    assert len(told) == 15
    folder = tmp_path / "sums"
    with pytest.raises(Stopped):
        run(16, folder, stop_at=40)
    told.clear()
    run(16, folder)
    assert told[0] == SamplesDone(40, 80)
    told.clear()
    extended = run(24, folder)
    assert told[0] == SamplesDone(24, 120)
    for name in ("l", "s", "b"):
        assert np.array_equal(getattr(extended, name), getattr(whole, name))
    assert {file.suffix for file in folder.iterdir()} == {".safetensors"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {mode_of_files}
    with pytest.raises(ValueError, match=r"samples is 16, but checkpoint .* holds 24"):
        run(16, folder)


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_part_that_cannot_be_read_is_computed_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    def run() -> tuple[samplers.Statistics, list[int]]:
        told: list[int] = []
        (found,) = compute_statistics(
            for_all(gaussian(VP)),
            VP,
            drawn(4),
            count=4,
            points=3,
            checkpoint=tmp_path,
            tell=lambda progress: told.append(progress.done),
        )
        return found, told

    whole, _ = run()
    part = sorted(tmp_path.iterdir())[1]
    if damage == "truncated":
        part.write_bytes(part.read_bytes()[:-8])
    else:
        save_file({"sums": torch.zeros(2)}, part)
    again, told = run()
    assert told == [8]
    assert f"{part} cannot be read and is computed again" in caplog.text
    assert np.array_equal(again.l, whole.l)
    assert run()[1] == []


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    def run(seed: int) -> None:
        compute_statistics(
            for_all(gaussian(VP)),
            VP,
            drawn(2),
            count=2,
            points=3,
            seed=seed,
            checkpoint=tmp_path,
        )

    run(0)
    run(0)
    with pytest.raises(ValueError, match="belongs to another run; remove it or choose another"):
        run(1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": 1}, "count is 1; it must be a whole number of at least 2"),
        ({"count": 3}, "count is 3; at most 2, the number of latents in samples"),
        ({"points": 2}, "points is 2; it must be a whole number of at least 3"),
        ({"chunk": 0}, "chunk is 0; it must be a whole number of at least 1"),
        ({"seed": -1}, "seed is -1; it must be a whole number of at least 0"),
        ({"reach": np.nan}, "reach is nan; it must be finite and at least 0"),
        ({"reach": "0.2"}, "reach is '0.2'; it must be a number"),
        ({"samples": drawn(2).half()}, r"samples is of type torch\.float16; it must be float32 or"),
        ({"samples": drawn(2).long()}, r"samples is of type torch\.int64; it must be float32 or"),
        ({"samples": drawn(2) * np.nan}, "samples has values that are not finite"),
        ({"samples": lambda rows: drawn(1)[: len(rows)]}, "gave 1 latents for the numbers 0 to 1"),
        ({"mixtures": []}, "mixtures is empty; at least one is needed"),
        ({"t_start": 1.0}, "t_start is 1 and t_end is 0.001"),
        ({"t_start": 0.4, "t_end": 0.6}, "t_start is 0.4 and t_end is 0.6"),
        ({"mixtures": [Mixture(weights=(2.0,))]}, "must sum to 1"),
        ({"mixtures": [Mixture(), Mixture(weights=(2.0, -1.0))]}, "one weight for each branch"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, object], says: str) -> None:
    given = {"samples": drawn(2), "count": 2, "points": 3} | change
    with pytest.raises(ValueError, match=says):
        compute_statistics(for_all(gaussian(FLOW)), FLOW, **given)  # type: ignore[arg-type]


def test_a_model_that_predicts_nan_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="l has values that are not finite"):
        compute_statistics(for_all(lambda x, _: x * np.nan), FLOW, drawn(2), count=2, points=3)


def test_the_package_comes_without_torch() -> None:
    code = "import samplers, sys; samplers.Statistics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert samplers.compute_statistics is compute_statistics
    assert not hasattr(samplers, "compute_nothing")

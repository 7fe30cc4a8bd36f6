"""Classifier guidance: published forms, closed forms, and independence of rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guidance import (
    CLASSIFIERS,
    DiffusionLevels,
    EluCD,
    GradientFree,
    GradientGuidance,
    Minority,
    ReferenceGuidance,
)
from guidance.classifier_guidance import UNAIMED
from tests.covering import spread

F64 = np.ndarray[Any, np.dtype[np.float64]]
HEADS = {
    "shape": ("circle", "square", "star"),
    "colour": ("red", "green"),
    "minority": tuple(f"tenth {number}" for number in range(1, 11)),
}
PROMPT = "a red star on a Red background"

each = pytest.mark.parametrize("kind", CLASSIFIERS, ids=lambda kind: kind.__name__)


def levels(alpha: F64, time: F64 | None = None, variance: F64 | None = None) -> DiffusionLevels:
    middle = np.full_like(alpha, 0.5)
    return DiffusionLevels(
        alpha,
        np.sqrt(1 - alpha**2),
        middle if time is None else time,
        middle if variance is None else variance,
    )


class Linear:
    """Logits ``W x + b`` of flattened pictures, with one matrix per attribute."""

    def __init__(self, size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight = {name: normal(len(classes), size) for name, classes in HEADS.items()}
        self.bias = {name: normal(len(classes)) for name, classes in HEADS.items()}

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        return {name: x @ w.T + self.bias[name] for name, w in self.weight.items()}


def targets(**numbers: list[int]) -> dict[str, Tensor]:
    rows = len(next(iter(numbers.values())))
    return {name: torch.tensor(numbers.get(name, [UNAIMED] * rows)) for name in HEADS}


def gradient(
    settings: list[Any], classifier: Callable[[Tensor], dict[str, Tensor]], x: Tensor, aimed: Any
) -> Tensor:
    x = x.clone().requires_grad_()
    kind = type(settings[0])
    objective = kind.objective(classifier(x), aimed, kind.parameters(settings, x))
    assert objective.shape == (len(x),)
    return torch.autograd.grad(objective.sum(), x)[0]


@each
def test_every_entry_acts_in_its_window_and_not_at_scale_zero(kind: Any) -> None:
    ratio, progress = np.array([np.inf, 3.0, 1.0, 0.2]), np.arange(4) / 4
    assert kind().evaluates(ratio, progress).all()
    assert kind(high=3.0, low=0.2).evaluates(ratio, progress).tolist() == [False, True, True, False]
    assert kind(stop=0.5).evaluates(ratio, progress).tolist() == [True, True, False, False]
    assert not kind(scale=0.0).evaluates(ratio, progress).any()
    assert isinstance(kind.evaluations, int)


@each
def test_strengths_are_finite_and_grow_with_the_scale(kind: Any) -> None:
    alpha = np.array([0.0, 2.0**-12, 0.3, 1.0])
    once, twice = kind(scale=1.0).strengths(levels(alpha)), kind(scale=2.0).strengths(levels(alpha))
    assert once.shape == (4,)
    assert np.isfinite(once).all()
    assert np.allclose(twice, 2 * once)


@pytest.mark.parametrize("setting", [EluCD(gamma=0), Minority(scale=1.0)], ids=["elucd", "minor"])
def test_the_shift_is_that_of_the_noise_and_none_without_signal(setting: GradientGuidance) -> None:
    """eps - sigma grad, through D = (x - sigma eps) / alpha."""
    alpha = np.array([0.0, 0.006, 0.5, 0.99])
    at = levels(alpha)
    found = setting.strengths(at)
    assert found[0] == 0
    x, eps, grad = 0.7, -0.4, 1.3
    before = (x - at.sigma[1:] * eps) / alpha[1:]
    after = (x - at.sigma[1:] * (eps - at.sigma[1:] * grad)) / alpha[1:]
    assert np.allclose(before + found[1:] * grad, after, rtol=1e-12)


def betas_of(steps: int) -> tuple[F64, F64, F64]:
    """A linear beta schedule with the usual ends for any number of steps, and beta over time."""
    time = np.arange(1, steps + 1) / steps
    rate = 0.1 + 19.9 * time
    return -np.expm1(-rate / steps), rate, time


def chain(steps: int, setting: EluCD, noise: F64, *, published: bool, posterior: bool) -> F64:
    """DDPM on Gaussian pictures of mean 0.3 and deviation 0.6, guided by a Gaussian classifier.

    Two classes of equal variance have logits that are linear in the picture, so the gradient of
    T1 logit_y - logsumexp(T2 logits) has a closed form.
    """
    beta, rate, time = betas_of(steps)
    bar = np.cumprod(1 - beta)
    before = np.append(1.0, bar[:-1])
    variance = beta * (1 - before) / (1 - bar) if posterior else beta
    at = DiffusionLevels(np.sqrt(bar), np.sqrt(1 - bar), time, rate / rate.max())
    strengths = setting.strengths(at)
    mean, deviation = 0.3, 0.6
    x = noise[0]
    for t in range(steps - 1, -1, -1):
        gain = np.sqrt(bar[t]) * deviation**2 / (bar[t] * deviation**2 + 1 - bar[t])
        D = mean + gain * (x - np.sqrt(bar[t]) * mean)
        logits = np.stack([1.2 * D - 0.4, -0.7 * D + 0.1])
        shares = np.exp(setting.marginal_temperature * logits)
        shares /= shares.sum(0)
        inner = 1.2 * shares[0] - 0.7 * shares[1]
        g = setting.joint_temperature * 1.2 - setting.marginal_temperature * inner
        of_D = np.sqrt(before[t]) * beta[t] / (1 - bar[t])
        of_x = np.sqrt(1 - beta[t]) * (1 - before[t]) / (1 - bar[t])
        if published:
            extra = setting.gamma * variance.max() * np.sin(np.pi * t / steps)
            mu = of_D * D + of_x * x + setting.scale * (variance[t] + extra) * g
        else:
            mu = of_D * (D + strengths[t] * g) + of_x * x
        # The same Brownian path for all numbers of steps, with increments summed over each step.
        path = noise[1:].reshape(steps, -1, noise.shape[1])[t]
        fresh = path.sum(0) / np.sqrt(len(path))
        x = mu + (np.sqrt(variance[t]) * fresh if t else 0.0)
    return x


@pytest.mark.parametrize(("posterior", "gamma"), spread([True, False], [0.0, 0.3, 3.0]))
def test_elucd_is_the_published_shift_of_the_mean_as_steps_shrink(
    gamma: float, posterior: bool
) -> None:
    setting = EluCD(scale=1.5, gamma=gamma)
    noise = np.random.default_rng(0).standard_normal((1 + 1600, 500))
    apart: list[float] = []
    for steps in (100, 400, 1600):
        ours, theirs = (
            chain(steps, setting, noise, published=published, posterior=posterior)
            for published in (False, True)
        )
        apart.append(float(np.sqrt(np.square(ours - theirs).mean())))
        unled = chain(steps, EluCD(scale=0.0), noise, published=False, posterior=posterior)
        moved = float(np.abs(ours - unled).mean())
    # With four times the steps the difference is a quarter.
    assert apart[1] < 0.4 * apart[0]
    assert apart[2] < 0.4 * apart[1]
    assert apart[2] < 0.02 * moved


def test_elucd_at_temperature_one_is_the_log_probability() -> None:
    classifier, x = Linear(5), torch.randn(4, 5, dtype=torch.float64)
    one = EluCD(joint_temperature=1, marginal_temperature=1)
    logits, aimed = classifier(x), targets(shape=[0, 2, 1, 1])
    found = EluCD.objective(logits, aimed, EluCD.parameters([one] * 4, x))
    expected = logits["shape"].log_softmax(1)[range(4), aimed["shape"]]
    torch.testing.assert_close(found, expected)


def test_elucd_sums_over_the_attributes_that_are_aimed_at_alone() -> None:
    classifier, x = Linear(5), torch.randn(3, 5, dtype=torch.float64)
    settings = [
        EluCD(),
        EluCD(joint_temperature=2, marginal_temperature=0.7),
        EluCD(marginal_temperature=0),
    ]
    aimed = targets(shape=[2, UNAIMED, 0], colour=[1, 0, UNAIMED])
    found = gradient(settings, classifier, x, aimed)
    for row, setting in enumerate(settings):
        expected = torch.zeros(5, dtype=torch.float64)
        for name in HEADS:
            number = int(aimed[name][row])
            if number == UNAIMED:
                continue
            T1, T2 = setting.joint_temperature, setting.marginal_temperature
            W, b = classifier.weight[name], classifier.bias[name]
            shares = torch.softmax(T2 * (W @ x[row] + b), 0)
            expected += T1 * W[number] - T2 * shares @ W
        torch.testing.assert_close(found[row], expected)


def test_minority_is_the_gradient_of_the_log_probability_of_its_tenth() -> None:
    classifier, x = Linear(5), torch.randn(2, 5, dtype=torch.float64)
    settings = [Minority(), Minority(tenth=3)]
    names = [setting.aims["minority"] for setting in settings]
    assert names == ["tenth 10", "tenth 3"]
    numbers = [HEADS["minority"].index(name) for name in names]
    found = gradient(settings, classifier, x, targets(minority=numbers))
    W, b = classifier.weight["minority"], classifier.bias["minority"]
    for row, number in enumerate(numbers):
        expected = W[number] - torch.softmax(W @ x[row] + b, 0) @ W
        torch.testing.assert_close(found[row], expected)


ROWS = st.lists(
    st.tuples(st.integers(-1, 2), st.integers(-1, 1), st.integers(0, 9)), min_size=1, max_size=5
)


@given(rows=ROWS, seed=st.integers(0, 99))
def test_each_row_is_as_if_it_were_alone(rows: list[tuple[int, int, int]], seed: int) -> None:
    classifier = Linear(4, seed)
    x = torch.randn(
        len(rows), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    shape, colour, minority = (list(numbers) for numbers in zip(*rows, strict=True))
    aimed = targets(shape=shape, colour=colour, minority=minority)
    for kind in (EluCD, Minority):
        settings = [kind(scale=1.0 + row) for row in range(len(rows))]
        together = gradient(settings, classifier, x, aimed)
        for row in range(len(rows)):
            own = {name: numbers[row : row + 1] for name, numbers in aimed.items()}
            alone = gradient(settings[row : row + 1], classifier, x[row : row + 1], own)
            torch.testing.assert_close(together[row : row + 1], alone)


@given(
    logits=st.lists(
        st.lists(st.floats(-8, 8, width=32), min_size=5, max_size=5), min_size=1, max_size=4
    ),
    aims=st.sampled_from([{"shape": 2, "colour": 0}, {"shape": 0}, {"colour": 1}]),
)
def test_gradient_free_leads_away_from_the_likeliest_class_that_is_wrong(
    logits: list[list[float]], aims: dict[str, int]
) -> None:
    heads = {name: HEADS[name] for name in ("shape", "colour")}
    seen = torch.tensor(logits, dtype=torch.float64)
    by_head = {"shape": seen[:, :3], "colour": seen[:, 3:]}
    rows = len(logits)
    numbers = {name: torch.full((rows,), aims.get(name, UNAIMED)) for name in heads}
    said = {name: heads[name][number] for name, number in aims.items()}
    prompt = f"the {' '.join(said.values())} thing"
    told = GradientFree(target=said).alternatives(prompt, heads)
    reference = GradientFree.refer(by_head, numbers)
    for row in range(rows):
        wrong = [
            (float(by_head[name][row].softmax(0)[k]), name, k)
            for name in heads
            if name in aims
            for k in range(len(heads[name]))
            if k != aims[name]
        ]
        share, name, k = max(wrong, key=lambda one: one[0])
        chosen = told[int(reference.choice[row])]
        best = [other for other in wrong if other[0] == share]
        assert chosen in {prompt.replace(said[n], heads[n][j]) for _, n, j in best}
        if len(best) == 1:
            assert chosen == prompt.replace(said[name], heads[name][k])
            own = float(by_head[name][row].softmax(0)[aims[name]])
            assert float(reference.strength[row]) == pytest.approx(1 - own)


def test_gradient_free_replaces_whole_words_whatever_their_case() -> None:
    told = GradientFree(target={"colour": "red"}).alternatives(PROMPT, HEADS)
    assert told == ("a green star on a green background",)
    assert GradientFree(target={"shape": "star"}).alternatives("starry star", HEADS) == (
        "starry circle",
        "starry square",
    )
    with pytest.raises(ValueError, match=r"target\.shape is 'circle', which the prompt does not"):
        GradientFree(target={"shape": "circle"}).alternatives("circles", HEADS)


def test_gradient_free_is_the_scale_at_every_stage_and_costs_an_evaluation() -> None:
    at = levels(np.array([0.0, 0.5, 1.0]))
    assert GradientFree(scale=2.5).strengths(at).tolist() == [2.5] * 3
    assert [kind.evaluations for kind in CLASSIFIERS[:3]] == [0, 0, 1]


def test_aims_are_what_was_asked_for() -> None:
    for kind in (EluCD, GradientFree):
        assert kind(target={"shape": "star"}).aims == {"shape": "star"}
        assert kind().aims == {}
    assert issubclass(GradientFree, ReferenceGuidance)

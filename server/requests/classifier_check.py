"""What a request asks of the model's classifier: refused where it cannot, else made ready."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from guidance import ClassifierGuidance, DiffusionLevels, ReferenceGuidance
from guidance.classifier_guidance import UNAIMED
from samplers import NoiseSchedule, Plan
from server.engine.task import Aim
from server.errors import InvalidRequest
from server.models.hosted import HostedModel
from server.requests.choice import listed
from server.requests.guidance_check import check_window
from server.requests.schema import ResolvedRequest

if TYPE_CHECKING:
    # Not when running: it needs torch, and this module does not.
    from server.models.classifier import LatentClassifier

__all__ = ["aim_of", "alternatives_of", "check_classifier", "levels_of"]

FIELD = "guidance.classifier"
TRAINED_STEPS = 1000
"""Steps of the diffusion that published variances are of."""


def check_classifier(resolved: ResolvedRequest, model: HostedModel) -> None:
    """Refuse an aim that the model's classifier cannot see, or that the prompt does not say.

    Raises:
        InvalidRequest: there is no classifier, or it lacks an attribute or a class.
    """
    term = resolved.guidance.classifier
    if term is None:
        return
    heads = _classifier_of(term, model).heads
    if not term.aims:
        raise InvalidRequest(
            f"{FIELD}.target",
            f"{FIELD}.target is empty; {term.name!r} needs a class of at least one of "
            f"{listed([*heads])}.",
        )
    for attribute, name in term.aims.items():
        if attribute not in heads:
            raise InvalidRequest(
                f"{FIELD}.target",
                f"{FIELD}.target names {attribute[:60]!r}; the classifier of model "
                f"{model.facts.name!r} knows {listed([*heads])}.",
            )
        if name not in heads[attribute]:
            raise InvalidRequest(
                f"{FIELD}.target.{attribute}",
                f"{FIELD}.target.{attribute} is {name[:60]!r}; the classifier of model "
                f"{model.facts.name!r} knows {listed(heads[attribute])}.",
            )
    alternatives_of(resolved, model)


def alternatives_of(resolved: ResolvedRequest, model: HostedModel) -> tuple[str, ...]:
    """The prompts that the classifier chooses a reference among; none where it chooses none.

    Raises:
        InvalidRequest: the prompt does not say what is aimed at.
    """
    term = resolved.guidance.classifier
    if not isinstance(term, ReferenceGuidance):
        return ()
    try:
        return term.alternatives(resolved.prompt, _classifier_of(term, model).heads)
    except ValueError as refusal:
        raise InvalidRequest(f"{FIELD}.target", str(refusal)) from None


def aim_of(resolved: ResolvedRequest, model: HostedModel, plan: Plan) -> Aim | None:
    """What every image of the request asks of the classifier; None where it asks nothing.

    Raises:
        InvalidRequest: the window of the term holds none of the steps.
    """
    term = resolved.guidance.classifier
    if term is None:
        return None
    check_window(term, plan, FIELD, f"the window of {term.name!r}")
    heads = _classifier_of(term, model).heads
    acts = term.evaluates(plan.noise_ratio, plan.progress)
    numbers = (
        classes.index(term.aims[attribute]) if attribute in term.aims else UNAIMED
        for attribute, classes in heads.items()
    )
    return Aim(
        guidance=term,
        targets=tuple(numbers),
        strengths=acts * term.strengths(levels_of(plan, model.facts.schedule)),
        alternatives=alternatives_of(resolved, model),
    )


def levels_of(plan: Plan, schedule: NoiseSchedule) -> DiffusionLevels:
    """Where the stages of a plan stand in the diffusion of a schedule."""
    span = schedule.t_start - schedule.t_end
    everywhere = np.linspace(schedule.t_end, schedule.t_start, TRAINED_STEPS)
    alpha, sigma, t = (np.asarray(v[:-1], np.float64) for v in (plan.alpha, plan.sigma, plan.t))
    return DiffusionLevels(
        alpha=alpha,
        sigma=sigma,
        time=np.clip((t - schedule.t_end) / span, 0, 1),
        variance=_variance(t, schedule) / _variance(everywhere, schedule).max(),
    )


def _variance(t: NDArray[np.float64], schedule: NoiseSchedule) -> NDArray[np.float64]:
    """Variance of the noise that one of a thousand steps adds around times t, in (0, 1].

    The schedule is taken at its log SNR, as if it preserved the variance.
    """
    length = (schedule.t_start - schedule.t_end) / TRAINED_STEPS
    first = np.clip(t - length / 2, schedule.t_end, schedule.t_start - length / 2)
    last = np.clip(t + length / 2, schedule.t_end + length / 2, schedule.t_start)
    with np.errstate(divide="ignore", over="ignore"):
        before, after = (np.logaddexp(0, -2 * schedule.half_log_snr(end)) for end in (first, last))
    return -np.expm1((before - after) * length / (last - first))


def _classifier_of(term: ClassifierGuidance, model: HostedModel) -> LatentClassifier:
    if model.classifier is None:
        raise InvalidRequest(
            FIELD,
            f"{FIELD} is {term.name!r}, and model {model.facts.name!r} has no classifier: "
            f"{model.classifier_lacks}; leave {FIELD} out.",
        )
    return model.classifier

"""Guidance by the model's classifier: along its gradient, or away from a prompt it chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import override

from guidance.classifier_guidance import UNAIMED, GradientGuidance, ReferenceGuidance
from server.engine.state.padding import padded
from server.engine.terms.term import RowSpec, Term
from server.engine.tick.answers import answering
from server.errors import InvalidRequest
from server.models.blend import Blend
from server.models.prompt_editing import EditedPrompt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from torch import Tensor

    from guidance import ClassifierGuidance
    from server.engine.terms.seen import ForwardRows, ImageRows, Predictions, TermContext
    from server.engine.terms.term import Run
    from server.models.conditioning import Conditioning


@dataclass(frozen=True, slots=True, eq=False)
class ClassifierGradientTerm(Term):
    """``D + strength grad``, with the gradient of the classifier's objective.

    Attributes:
        guidance: settings with the objective.
        targets: number of the target class, for each attribute in the classifier's order; -1 for
            none.
        strengths: strength at each stage; 0 where the term does not act.
    """

    made_from: ClassVar = GradientGuidance
    applies: ClassVar = True
    guidance: GradientGuidance
    targets: tuple[int, ...]
    strengths: tuple[float, ...]

    @classmethod
    @override
    def of(cls, setting: GradientGuidance, run: Run) -> Self:
        return cls(setting, _targets_of(setting, run), _strengths_of(setting, run))

    @override
    def acts(self, stage: int) -> bool:
        return self.strengths[stage] != 0

    @classmethod
    @override
    def apply(
        cls, terms: Sequence[Self], denoised: Tensor, predictions: Predictions, seen: TermContext
    ) -> Tensor:
        clean = [term.guidance.shows == "denoised" for term in terms]
        shown = denoised.where(seen.factors(clean) > 0, seen.x)
        alpha = [1.0 if c else a for c, a in zip(clean, seen.alpha, strict=True)]
        sigma = [0.0 if c else s for c, s in zip(clean, seen.sigma, strict=True)]
        # Tensors of inference mode carry no gradients; copies made outside of it do.
        with torch.inference_mode(mode=False), torch.enable_grad():
            x = shown.clone().requires_grad_()
            levels = (seen.scalars(level).clone() for level in (alpha, sigma))
            logits = seen.lane.model.classify(x, *levels)
            [gradient] = torch.autograd.grad(_objective(terms, logits), x)
        strengths = [term.strengths[at] for term, at in zip(terms, seen.stages, strict=True)]
        return denoised + seen.factors(strengths) * gradient


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceGuidanceTerm(Term):
    """``D + strength (Dc - Dr)``, where Dr has the prompt, of several, that the classifier chooses.

    The state of an image is the strength that the classifier found at this stage, 0-dimensional.

    Attributes:
        guidance: settings of the choice.
        targets: number of the target class, for each attribute in the classifier's order; -1 for
            none.
        strengths: strength at each stage; 0 where the term does not act.
        alternatives: prompts to choose from.
    """

    made_from: ClassVar = ReferenceGuidance
    prepares: ClassVar = True
    applies: ClassVar = True
    guidance: ReferenceGuidance
    targets: tuple[int, ...]
    strengths: tuple[float, ...]
    alternatives: tuple[str, ...]

    @classmethod
    @override
    def of(cls, setting: ReferenceGuidance, run: Run) -> Self:
        if isinstance(run.prompt, Blend | EditedPrompt):
            other = "a blend of prompts" if isinstance(run.prompt, Blend) else "prompt editing"
            raise InvalidRequest(
                "guidance.classifier",
                f"guidance.classifier is {setting.name!r}, which replaces a word of the prompt; it "
                f"is incompatible with {other}.",
            )
        alternatives = setting.alternatives(run.prompt, _heads_of(run))
        targets, strengths = _targets_of(setting, run), _strengths_of(setting, run)
        return cls(setting, targets, strengths, alternatives)

    @override
    def acts(self, stage: int) -> bool:
        return self.strengths[stage] != 0

    @override
    def rows(self, stage: int) -> tuple[RowSpec, ...]:
        return (RowSpec(self.alternatives[0]),)

    @property
    @override
    def texts(self) -> tuple[str | None, ...]:
        return self.alternatives

    @classmethod
    @override
    def prepare(
        cls,
        terms: Sequence[Self],
        forward: ForwardRows,
        own: Sequence[ImageRows],
        seen: TermContext,
    ) -> None:
        inputs = seen.x, seen.scalars(seen.alpha), seen.scalars(seen.sigma)
        logits = seen.lane.model.classify(*(padded(one, seen.fixed_rows) for one in inputs))
        choices = torch.empty(len(terms), dtype=torch.int64, device=inputs[0].device)
        strengths = torch.empty_like(inputs[1])
        for kind, members in _by_kind(terms).items():
            where = seen.lane.indices(members)
            with answering(terms[members[0]].guidance, choices.device):
                reference = kind.refer(*_of(members, terms, logits))
            choices.index_copy_(0, where, reference.choice)
            strengths.index_copy_(0, where, reference.strength)
        alternatives: list[Conditioning] = []
        first: list[int] = []
        for term, of in zip(terms, seen.conditioning_for, strict=True):
            first.append(len(alternatives))
            alternatives += map(of, term.alternatives)
        # Chosen on the device, so that the tick need not wait for it.
        stacked = seen.lane.model.stack(alternatives, fixed=seen.fixed_rows is not None)
        chosen = stacked.select(seen.lane.indices(first) + choices)
        rows = seen.lane.indices([row for rows in own for row in rows.term])
        forward.conditioning = forward.conditioning.put(rows, chosen)
        seen.states[:] = strengths.unbind()

    @classmethod
    @override
    def apply(
        cls, terms: Sequence[Self], denoised: Tensor, predictions: Predictions, seen: TermContext
    ) -> Tensor:
        scales = [term.strengths[at] for term, at in zip(terms, seen.stages, strict=True)]
        factors = seen.factors(scales)
        strengths = factors * torch.stack(seen.states).view_as(factors)
        return denoised + strengths * (predictions.cond() - predictions.own())


def _heads_of(run: Run) -> Mapping[str, tuple[str, ...]]:
    """Classes of each attribute that the model's classifier knows."""
    return {} if run.model.classifier is None else run.model.classifier.heads


def _targets_of(setting: ClassifierGuidance, run: Run) -> tuple[int, ...]:
    return tuple(
        classes.index(setting.aims[attribute]) if attribute in setting.aims else UNAIMED
        for attribute, classes in _heads_of(run).items()
    )


def _strengths_of(setting: ClassifierGuidance, run: Run) -> tuple[float, ...]:
    acts = setting.evaluates(run.plan.noise_ratio, run.plan.progress)
    return tuple((acts * setting.strengths(run.levels())).tolist())


def _objective(terms: Sequence[ClassifierGradientTerm], logits: Mapping[str, Tensor]) -> Tensor:
    """Objective summed over the rows; the gradient of each row depends on its summand alone."""
    summands: list[Tensor] = []
    for kind, members in _by_kind(terms).items():
        own, targets = _of(members, terms, logits)
        settings = [terms[i].guidance for i in members]
        like = next(iter(own.values()))
        with answering(settings[0], like.device):
            parameters = kind.parameters(settings, like)
            summands.append(kind.objective(own, targets, parameters).sum())
    return torch.stack(summands).sum()


def _of(
    members: Sequence[int],
    terms: Sequence[ClassifierGradientTerm] | Sequence[ReferenceGuidanceTerm],
    logits: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits ``[members, classes]`` of each attribute, and the target classes ``[members]``."""
    device = next(iter(logits.values())).device
    aimed = [terms[i].targets for i in members]
    where, targets = (
        torch.tensor(values).to(device, non_blocking=True) for values in (members, aimed)
    )
    own = {name: values.index_select(0, where) for name, values in logits.items()}
    return own, dict(zip(logits, targets.unbind(1), strict=True))


def _by_kind(
    terms: Sequence[ClassifierGradientTerm] | Sequence[ReferenceGuidanceTerm],
) -> dict[Any, list[int]]:
    kinds: dict[Any, list[int]] = {}
    for i, term in enumerate(terms):
        kinds.setdefault(type(term.guidance), []).append(i)
    return kinds

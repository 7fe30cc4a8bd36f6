"""Gradient-free classifier guidance: away from the class that the picture is mistaken for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from guidance.classifier_guidance import UNAIMED, Reference, ReferenceGuidance, Target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class GradientFree(ReferenceGuidance, frozen=True):
    """After gradient-free classifier guidance (Shenoy et al., arXiv 2411.15393).

    From the paper: at each stage a classifier, used only in inference, chooses among conditional
    predictions the reference that guidance moves away from, and sets the scale by its uncertainty
    about the picture. The formula is ours: of all classes q, other than the target y, of the
    attributes that have a target, the reference is the one with the greatest ``p(q | x)``, and

        D += scale (1 - p(y | x)) (Dc - Dq)

    with Dq for the prompt in which the word of y is replaced by that of q. The classifier reads x
    at its noise level before the forward pass, so the choice costs no evaluation; Dq costs one.
    With the rule ``none`` Dq takes the place of the negative prompt's prediction; with another
    rule it is an additional one.
    """

    summary: ClassVar[str] = "Steers away from the class that a classifier mistakes the image for."
    source: ClassVar[str] = "After Shenoy et al., arXiv 2411.15393; the formula is ours."
    name: Literal["gradient_free"] = "gradient_free"
    target: Target = Field(default={})

    @property
    @override
    def aims(self) -> Mapping[str, str]:
        return self.target

    @override
    def alternatives(self, prompt: str, heads: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        told: list[str] = []
        for attribute, classes in heads.items():
            if attribute not in self.target:
                continue
            said = self.target[attribute]
            word = re.compile(rf"\b{re.escape(said)}\b", re.IGNORECASE)
            if not word.search(prompt):
                raise ValueError(
                    f"guidance.classifier.target.{attribute} is {said!r}, which the prompt does "
                    f"not contain; {self.name} replaces that word, so only words of the prompt are "
                    "allowed."
                )
            told += [word.sub(lambda _, q=q: q, prompt) for q in classes if q != said]
        return tuple(told)

    @classmethod
    @override
    def refer(cls, logits: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Reference:
        from torch import arange, cat

        taken: list[Tensor] = []
        candidates: list[Tensor] = []
        doubts: list[Tensor] = []
        for attribute, seen in logits.items():
            aimed = targets[attribute][:, None]
            share = seen.softmax(1)
            others = (arange(share.shape[1], device=share.device) != aimed) & (aimed != UNAIMED)
            doubt = 1 - share.gather(1, aimed.clamp(min=0))
            taken.append(share.where(others, share.new_full((), -1.0)))
            candidates.append(others)
            doubts.append(doubt.expand_as(share))
        place = cat(taken, 1).argmax(1, keepdim=True)
        # Alternatives list only the row's own candidates, in the same order.
        choice = cat(candidates, 1).cumsum(1).gather(1, place)[:, 0] - 1
        return Reference(choice, cat(doubts, 1).gather(1, place)[:, 0])

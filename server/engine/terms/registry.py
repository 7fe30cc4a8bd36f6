"""All terms, in the order in which they act."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.engine.terms.cfg_norm import KeptLengths
from server.engine.terms.classifier import AwayFromChosen, UpGradient
from server.engine.terms.nag import AgainstNegative
from server.engine.terms.negtome import KeptApart
from server.engine.terms.network_change import ChangedRows
from server.engine.terms.particles import ResampledParticles
from server.engine.terms.perturbation import Disturbed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from server.engine.terms.term import Run, Term

TERMS: tuple[type[Term], ...] = (
    ChangedRows,
    AgainstNegative,
    Disturbed,
    KeptApart,
    AwayFromChosen,
    UpGradient,
    KeptLengths,
    ResampledParticles,
)
"""One class for each class of settings beside a rule; a new term is one more."""


def terms_of(settings: Iterable[object], run: Run) -> tuple[Term, ...]:
    """The terms that a request's guidance asks for, in the order in which they act.

    Args:
        settings: all that the guidance consists of beside its rule; those of no term are left out.
        run: of the request.
    """
    asked = list(settings)
    return tuple(
        kind.of(setting, run)
        for kind in TERMS
        for setting in asked
        if issubclass(type(setting), kind.made_from)
    )


def order_of(kind: type[Term]) -> int:
    """When the terms of a class act; those that are not registered act last."""
    return TERMS.index(kind) if kind in TERMS else len(TERMS)

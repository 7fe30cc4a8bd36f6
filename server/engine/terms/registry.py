"""All terms, in the order in which they act."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.engine.terms.cfg_norm import CFGNormTerm
from server.engine.terms.classifier import ClassifierGradientTerm, ReferenceGuidanceTerm
from server.engine.terms.nag import NAGTerm
from server.engine.terms.negtome import NegToMeTerm
from server.engine.terms.network_change import NetworkChangeTerm
from server.engine.terms.particles import FeynmanKacTerm
from server.engine.terms.perturbation import PerturbationTerm
from server.plugin_faults import containing_exits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from server.engine.terms.term import Run, Term

TERMS: tuple[type[Term], ...] = (
    NetworkChangeTerm,
    NAGTerm,
    PerturbationTerm,
    NegToMeTerm,
    ReferenceGuidanceTerm,
    ClassifierGradientTerm,
    CFGNormTerm,
    FeynmanKacTerm,
)
"""One class per class of settings other than a rule; a new term is added here."""


@containing_exits()
def terms_of(settings: Iterable[object], run: Run) -> tuple[Term, ...]:
    """Make the terms that a request's guidance asks for, in the order in which they act.

    Args:
        settings: all settings of the guidance other than its rule; those of no term are ignored.
        run: run of the request.

    Raises:
        WeftError: a plug-in exits.
    """
    asked = list(settings)
    return tuple(
        kind.of(setting, run)
        for kind in TERMS
        for setting in asked
        if issubclass(type(setting), kind.made_from)
    )


def order_of(kind: type[Term]) -> int:
    """Rank of a class in the order of terms; classes that are not registered act last."""
    return TERMS.index(kind) if kind in TERMS else len(TERMS)

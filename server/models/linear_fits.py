"""The coefficients of linear adaptive guidance in a model folder."""

from __future__ import annotations

import json
import logging
from threading import Lock
from typing import TYPE_CHECKING

from guidance.linear_fit import FitIdentity, LinearFit, run_fingerprint
from server.models.folder import DERIVED, stamp_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from guidance import Rule
    from samplers import Plan

logger = logging.getLogger(__name__)

PREFIX = "linear-ag"


def identity_of(revision: str, plan: Plan, rule: Rule, every: int) -> FitIdentity:
    """The identity that coefficients must have been fitted for to be used in a run.

    Args:
        revision: revision of the model's weights without the autoencoder's.
        plan: plan of the sampler.
        rule: guidance rule with its parameters.
        every: number of steps from one evaluation of the second branch to the next.
    """
    run = run_fingerprint(plan.t, plan.alpha, plan.sigma, plan.tables)
    return FitIdentity(revision, run, rule.model_dump_json(), every)


def fit_file(folder: Path, sampler: str, steps: int, identity: FitIdentity) -> Path:
    """File in a model folder for coefficients."""
    name = f"{PREFIX}-{sampler}-{steps}-{identity.digest}.safetensors"
    return folder / DERIVED / name


class LinearFits:
    """The coefficients in a model folder, looked up by their identity; safe from any thread.

    Each lookup lists the folder again, so that new or rewritten files need no restart; unchanged
    files are read only once.

    Args:
        folder: model folder; None where there is none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        # Replaced, never modified: other threads may be iterating over it.
        self._read: Mapping[Path, tuple[tuple[int, int], LinearFit | None]] = {}
        self._reading = Lock()

    def find(self, identity: FitIdentity) -> LinearFit | None:
        """The coefficients fitted for exactly this identity; None if there are none."""
        self._read_new()
        fits = (fit for _, fit in self._read.values() if fit is not None)
        return next((fit for fit in fits if fit.identity == identity), None)

    def available(self, revision: str) -> tuple[str, ...]:
        """Descriptions of the coefficients, e.g. "unipc, 12 steps, cfg at scale 4, every 2".

        Args:
            revision: revision of the model's weights without the autoencoder's.
        """
        self._read_new()
        fits = ((file, fit) for file, (_, fit) in self._read.items() if fit is not None)
        return tuple(_described(*one) for one in fits if one[1].identity.model == revision)

    def _read_new(self) -> None:
        if self._folder is None:
            return
        with self._reading:
            read = dict(self._read)
            for file in sorted((self._folder / DERIVED).glob(f"{PREFIX}-*.safetensors")):
                stamp = stamp_of(file)
                if file in read and read[file][0] == stamp:
                    continue
                try:
                    fit = LinearFit.load(file)
                except ValueError as error:
                    logger.warning("%s is left out: %s", file, error)
                    fit = None
                read[file] = stamp, fit
            self._read = read


def _described(file: Path, fit: LinearFit) -> str:
    # `fit_file` puts sampler and steps into the name; the identity has only a hash of them.
    name = file.stem.removeprefix(f"{PREFIX}-").rsplit("-", 2)
    run = f"{name[0]}, {name[1]} steps" if len(name) == 3 else file.name
    rule = json.loads(fit.identity.rule)
    scale = f" at scale {rule['scale']:g}" if "scale" in rule else ""
    return f"{run}, {rule['name']}{scale}, every {fit.identity.every}"

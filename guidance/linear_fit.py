"""Coefficients of linear adaptive guidance: fitted over stored runs, and their file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from guidance.linear_adaptive import PAIRS, TERMS

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

FORMAT = "weft.linear_ag.1"


def moments(
    cond: NDArray[np.float64], other: NDArray[np.float64], evaluated: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Sums of products that the fit is made of; those of several chunks of runs add up.

    Args:
        cond: denoised predictions for the prompt in runs of full guidance,
            ``[runs, stages, ...]``.
        other: those of the second branch.
        evaluated: at which stages the policy will evaluate it, ``[stages]``.

    Returns:
        ``[stages, terms + 1, terms + 1]``, the last row and column those of what is estimated; 0
        at stages that are evaluated.
    """
    sums = np.zeros((len(evaluated), TERMS + 1, TERMS + 1))
    for i in np.flatnonzero(~evaluated):
        last = np.flatnonzero(evaluated[:i])[: -PAIRS - 1 : -1]
        pairs = [branch[:, k] for k in last for branch in (cond, other)]
        known = np.zeros((TERMS + 1, cond[:, i].size))
        for row, term in enumerate([cond[:, i], *pairs]):
            known[row] = term.ravel()
        known[TERMS] = other[:, i].ravel()
        sums[i] = known @ known.T
    return sums


def solve(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least-squares coefficients of each stage, ``[stages, terms]``; 0 for what a stage lacks.

    Args:
        sums: of :func:`moments`, over all runs.
    """
    found = np.zeros((len(sums), TERMS))
    for i, table in enumerate(sums):
        there = np.flatnonzero(np.diag(table)[:TERMS] > 0)
        # Each term at unit length, as the conditioning of the squares is that of the terms squared.
        scale = np.sqrt(np.diag(table)[there])
        normal = table[np.ix_(there, there)] / scale / scale[:, None]
        solution = np.linalg.lstsq(normal, table[there, TERMS] / scale, rcond=None)[0]
        found[i, there] = solution / scale
    return found


def residual(sums: NDArray[np.float64], coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    """Error of the estimates at each stage, as a share of the branches' difference, ``[stages]``.

    Args:
        sums: of :func:`moments`, of runs that need not be those of the fit.
        coefficients: of :func:`solve`.
    """
    of_estimate = np.append(coefficients, np.full((len(sums), 1), -1.0), axis=1)
    of_difference = np.zeros_like(of_estimate)
    of_difference[:, 0], of_difference[:, TERMS] = 1, -1
    error, whole = (
        np.einsum("si,sij,sj->s", weights, sums, weights)
        for weights in (of_estimate, of_difference)
    )
    return np.sqrt(np.maximum(error, 0) / np.where(whole > 0, whole, 1))


def run_fingerprint(*arrays: NDArray[np.floating[Any]]) -> str:
    """16 hexadecimal digits that follow the numbers of a run: its levels and its tables."""
    digest = hashlib.sha256()
    for array in arrays:
        # Rounded, as the last digits of exp and log differ between machines; and no negative zero.
        digest.update((np.round(array, 6) + 0.0).astype("<f8").tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class FitIdentity:
    """What coefficients were fitted for; they mean nothing for anything else.

    Attributes:
        model: revision of the model's weights without the autoencoder's.
        plan: :func:`run_fingerprint` of the sampler's plan.
        rule: the guidance rule with its parameters, as JSON.
        every: steps from one evaluation of the second branch to the next.
    """

    model: str
    plan: str
    rule: str
    every: int

    @property
    def digest(self) -> str:
        """8 hexadecimal digits that tell it from others of the same model."""
        return hashlib.sha256(f"{self.plan}{self.rule}{self.every}".encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class _NamedRule:
    """What can be told of any rule."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class LinearFit:
    """Fitted coefficients.

    Attributes:
        coefficients: ``[stages, branches * terms]``, those of a branch side by side.
        identity: what they are for.
        runs: how many they were fitted over.
        error: of the estimates over these runs, as a share of the difference from the prompt's
            prediction, of the branch where it is largest, ``[stages]``.
    """

    coefficients: NDArray[np.float64]
    identity: FitIdentity
    runs: int
    error: NDArray[np.float64]

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        metadata = {
            "format": FORMAT,
            "identity": json.dumps(asdict(self.identity)),
            "runs": str(self.runs),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.writing")
        # What a stopped run left would keep the mode that it has; and not by save_file, whose files
        # nobody but their owner may read.
        fresh.unlink(missing_ok=True)
        fresh.write_bytes(save({"coefficients": self.coefficients, "error": self.error}, metadata))
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> LinearFit:
        """Read a file that ``save`` wrote.

        Raises:
            ValueError: it holds no coefficients.
        """
        try:
            with safe_open(path, "np") as content:
                metadata = content.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError("another format")
                coefficients, errors = map(content.get_tensor, ("coefficients", "error"))
                if not np.isfinite(coefficients).all() or coefficients.shape[:-1] != errors.shape:
                    raise ValueError("numbers of no run")
                identity, runs = _identity(metadata["identity"]), int(metadata["runs"])
                return cls(coefficients, identity, runs, errors)
        # The last two of types of numbers that numpy has not.
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} holds no coefficients of linear guidance.") from error


def _identity(text: str) -> FitIdentity:
    """What the metadata of a file say.

    Raises:
        ValueError: they are nothing that ``save`` writes.
    """
    identity = TypeAdapter(FitIdentity).validate_json(text, strict=True)
    TypeAdapter(_NamedRule).validate_json(identity.rule, strict=True)
    return identity

"""Coefficients of linear adaptive guidance: their fit over stored runs, and their file format."""

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
    """Sums of products for the fit; those of several chunks of runs can be added.

    Args:
        cond: denoised predictions for the prompt in runs with full guidance,
            ``[runs, stages, ...]``.
        other: denoised predictions of the second branch, of the same shape.
        evaluated: stages at which the policy will evaluate the second branch, ``[stages]``.

    Returns:
        ``[stages, terms + 1, terms + 1]``, with the estimated prediction in the last row and
        column; 0 at stages that are evaluated.
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
    """Least-squares coefficients of each stage, ``[stages, terms]``; 0 for missing terms.

    Args:
        sums: result of :func:`moments`, over all runs.
    """
    found = np.zeros((len(sums), TERMS))
    for i, table in enumerate(sums):
        there = np.flatnonzero(np.diag(table)[:TERMS] > 0)
        # Terms are scaled to unit norm, as the normal equations square the condition number.
        scale = np.sqrt(np.diag(table)[there])
        normal = table[np.ix_(there, there)] / scale / scale[:, None]
        solution = np.linalg.lstsq(normal, table[there, TERMS] / scale, rcond=None)[0]
        found[i, there] = solution / scale
    return found


def residual(sums: NDArray[np.float64], coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    """Error of the estimates at each stage, relative to the branches' difference, ``[stages]``.

    Args:
        sums: result of :func:`moments`, not necessarily for the runs of the fit.
        coefficients: result of :func:`solve`.
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
    """16 hexadecimal digits derived from the numbers of a run: its levels and its tables."""
    digest = hashlib.sha256()
    for array in arrays:
        # Rounded, as the last digits of exp and log differ between machines; and no negative zero.
        digest.update((np.round(array, 6) + 0.0).astype("<f8").tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class FitIdentity:
    """What coefficients were fitted for; they are not valid for anything else.

    Attributes:
        model: revision of the model's weights, without those of the autoencoder.
        plan: :func:`run_fingerprint` of the sampler's plan.
        rule: guidance rule with its parameters, as JSON.
        every: number of steps from one evaluation of the second branch to the next.
    """

    model: str
    plan: str
    rule: str
    every: int

    @property
    def digest(self) -> str:
        """8 hexadecimal digits that distinguish it from others of the same model."""
        return hashlib.sha256(f"{self.plan}{self.rule}{self.every}".encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class _NamedRule:
    """The fields that any rule has."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class LinearFit:
    """Fitted coefficients.

    Attributes:
        coefficients: ``[stages, branches * terms]``, with those of one branch side by side.
        identity: what they were fitted for.
        runs: number of runs that they were fitted over.
        error: error of the estimates over these runs, relative to the difference from the prompt's
            prediction, for the branch where it is largest, ``[stages]``.
    """

    coefficients: NDArray[np.float64]
    identity: FitIdentity
    runs: int
    error: NDArray[np.float64]

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically."""
        metadata = {
            "format": FORMAT,
            "identity": json.dumps(asdict(self.identity)),
            "runs": str(self.runs),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.writing")
        # A file left by a stopped run would keep its mode. Not written by save_file, whose files
        # only their owner can read.
        fresh.unlink(missing_ok=True)
        fresh.write_bytes(save({"coefficients": self.coefficients, "error": self.error}, metadata))
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> LinearFit:
        """Read a file that ``save`` wrote.

        Raises:
            ValueError: the file holds no valid coefficients.
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
        # The last two are raised for dtypes that numpy does not have.
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} contains no coefficients of linear guidance.") from error


def _identity(text: str) -> FitIdentity:
    """Parse the identity in a file's metadata.

    Raises:
        ValueError: it is not as ``save`` writes it.
    """
    identity = TypeAdapter(FitIdentity).validate_json(text, strict=True)
    TypeAdapter(_NamedRule).validate_json(identity.rule, strict=True)
    return identity

"""Coefficients in a model folder, searched by several threads while files are added."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from guidance.linear_fit import FORMAT, FitIdentity, LinearFit
from server.models.linear_fits import LinearFits, fit_file

IDENTITY = FitIdentity("0123456789abcdef", "plan", '{"name": "cfg", "scale": 4}', 2)


def store(folder: Path, identity: FitIdentity, runs: int = 1) -> None:
    made = LinearFit(np.zeros((2, 3)), identity, runs, np.zeros(2))
    made.save(fit_file(folder, "ddim", 2, identity))


def test_a_search_goes_on_while_another_one_reads_new_files(tmp_path: Path) -> None:
    for number in range(3):
        store(tmp_path, replace(IDENTITY, plan=f"plan {number}"))
    fits = LinearFits(tmp_path)
    assert fits.find(IDENTITY) is None

    class Meanwhile:
        """An identity that is compared just when another thread finds a new file."""

        def __init__(self) -> None:
            self.compared = 0

        def __eq__(self, other: object) -> bool:
            self.compared += 1
            new = replace(IDENTITY, every=2 + self.compared)
            if self.compared <= 3:
                store(tmp_path, new)
                assert fits.find(new) is not None
            return False

    meanwhile = Meanwhile()
    assert fits.find(meanwhile) is None  # type: ignore[arg-type]
    assert meanwhile.compared == 3


@pytest.mark.parametrize(
    "identity",
    [
        "[]",
        '"cfg"',
        '{"model": ',
        "[" * 100_000,
        json.dumps(asdict(IDENTITY) | {"every": "two"}),
        json.dumps(asdict(IDENTITY) | {"rule": "cfg"}),
        json.dumps(asdict(IDENTITY) | {"rule": "[1]"}),
        json.dumps(asdict(IDENTITY) | {"rule": '{"name": "cfg", "scale": "4"}'}),
    ],
    ids=range(8),
)
def test_a_file_that_says_nothing_sensible_is_left_out(
    identity: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = fit_file(tmp_path, "ddim", 2, IDENTITY)
    file.parent.mkdir()
    arrays = {"coefficients": np.zeros((2, 3)), "error": np.zeros(2)}
    save_file(arrays, file, {"format": FORMAT, "runs": "1", "identity": identity})
    fits = LinearFits(tmp_path)
    assert fits.available(IDENTITY.model) == ()
    assert fits.find(IDENTITY) is None
    assert caplog.messages == [
        f"{file} is left out: {file.name} contains no coefficients of linear guidance."
    ]


@pytest.mark.parametrize("coefficients", [np.full((2, 3), np.nan), np.zeros((3, 3)), np.zeros(0)])
def test_a_file_of_numbers_that_make_no_picture_is_left_out(
    coefficients: NDArray[np.float64], tmp_path: Path
) -> None:
    file = fit_file(tmp_path, "ddim", 2, IDENTITY)
    LinearFit(coefficients, IDENTITY, 1, np.zeros(2)).save(file)
    assert LinearFits(tmp_path).find(IDENTITY) is None


@pytest.mark.parametrize("stale", [None, replace(IDENTITY, model="fedcba9876543210"), IDENTITY])
def test_a_file_that_is_written_anew_is_read_again(
    stale: FitIdentity | None, tmp_path: Path
) -> None:
    """`weft linear-ag` does so for other weights, for a damaged file, or with more runs.

    The name of a file does not depend on the weights.
    """
    file = fit_file(tmp_path, "ddim", 2, IDENTITY)
    if stale is None:
        file.parent.mkdir()
        file.write_bytes(b"damaged")
    else:
        store(tmp_path, stale)
    # Clocks of file systems may not distinguish two successive writes.
    os.utime(file, (0, 0))
    fits = LinearFits(tmp_path)
    fits.find(IDENTITY)
    store(tmp_path, IDENTITY, runs=20)
    found = fits.find(IDENTITY)
    assert found is not None
    assert found.runs == 20

"""The guidance study at a tiny size: it draws with the engine, resumes, and writes its page."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from embedded import MODEL_FOLDER
from server.models.loading import load_model
from studies.common.records import Records, key_of
from studies.guidance import cells, measures, measuring
from studies.guidance.__main__ import main
from studies.guidance.cells import BASE, RATED, UNGUIDED, Cell, all_cells, by, cfg
from studies.guidance.drawing import Drawing
from studies.guidance.page import write
from studies.guidance.results import Results
from studies.guidance.sitters import WHITE, Sitters
from studies.guidance.study import Sizes, Study
from tests.server.full_ticks import full_ticks

SIZES = Sizes(
    captions=2,
    again=1,
    true_pictures=24,
    known_pictures=1,
    fitted_runs=2,
    rated_images=2,
    rounds=1,
)
FEW = 2
"""Number of steps of a run in these tests."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Engines that do not measure the cost of ticks first, and few resamples."""
    with full_ticks(), patch("studies.guidance.measures.RESAMPLES", 20):
        yield


@contextmanager
def study_of(model_folder: Path, folder: Path) -> Generator[Study]:
    """The study of a model at a tiny size, with its files in a folder."""
    model = load_model(model_folder, name="embedded", device="cpu", dtype="float32")
    drawing = Drawing(model, 16, SIZES.fitted_runs, ["a red circle", "a blue ring"], folder)
    sitters = Sitters(SIZES.captions, SIZES.again, SIZES.known_pictures)
    yield Study(model, "weights", drawing, sitters, SIZES, folder)
    drawing.stop()


@pytest.fixture(scope="module")
def study(thin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """For what does not depend on what pictures show."""
    with study_of(thin_folder, tmp_path_factory.mktemp("guidance")) as made:
        yield made


@pytest.fixture(scope="module")
def trained_study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """The study of the embedded model."""
    with study_of(MODEL_FOLDER, tmp_path_factory.mktemp("guidance")) as made:
        yield made


def test_what_is_saved_is_what_the_engine_did_without(study: Study) -> None:
    full = study.run(Cell(BASE, steps=4))
    half = study.run(Cell(by(BASE, "reuse"), steps=4))
    assert full["evaluations"] == [8] * 2
    assert half["evaluations"] == [6] * 2
    assert half["saved"] == [2] * 2
    assert "psnr" not in full
    assert all(10 < decibels < 60 for decibels in half["psnr"])


def test_a_policy_that_saves_nothing_draws_the_same_pictures(study: Study) -> None:
    same = study.run(Cell(by(BASE, "reuse", every=1), steps=4))
    # The rows of a forward pass differ between ticks, so the last bits may differ.
    assert min(same["psnr"]) > 60


def test_linear_guidance_is_fitted_when_it_is_first_wanted(study: Study) -> None:
    found = study.run(Cell(by(BASE, "linear_adaptive"), steps=4))
    assert found["evaluations"] == [5] * 2


@pytest.mark.parametrize("sitting", ["overlapping", "avoiding", "aimed", "pictures"])
def test_every_sitting_is_drawn(study: Study, sitting: cells.Sitting) -> None:
    found = study.run(Cell(UNGUIDED, sitting, FEW))
    assert len(found["right"]) == SIZES.captions


def test_prompts_of_a_cell_are_filled_in_with_the_things_of_a_caption(study: Study) -> None:
    composed = cells.COMPOSED["composed, each thing by 1"]
    found = study.run(Cell(composed, "two", FEW))
    assert found["evaluations"] == [4 * FEW]


def test_a_classifier_aims_at_what_the_caption_shows(trained_study: Study) -> None:
    towards = trained_study.run(Cell(cells.BACKGROUND["cfg 4, elucd 8"], "aimed", 4))
    alone = trained_study.run(Cell(cells.BACKGROUND["cfg 4"], "aimed", 4))
    # The captions do not mention the background, so only the classifier can lead to it.
    assert towards["attributes"]["background"][0] > alone["attributes"]["background"][0]
    assert towards["evaluations"] == alone["evaluations"]


def test_images_of_a_request_are_compared_with_one_another(study: Study) -> None:
    cell = Cell(cells.APART["cfg 4"], steps=FEW, each=3)
    found = study.run(cell)
    assert len(found["right"]) == 3 * SIZES.captions
    assert len(found["apart"]) == SIZES.captions
    assert all(apart > 0.1 for apart in found["apart"])
    assert "frechet" not in found
    # The images of a request have the seeds that follow its own.
    alone = study.run(replace(cell, each=1))
    assert found["spread"][:: cell.each] == pytest.approx(alone["spread"], rel=1e-4)


def test_particles_take_one_another_s_place(study: Study) -> None:
    """Resampled images share a past, so they are more alike than independent ones."""
    sitting: dict[str, Any] = {"steps": 4, "sampler": cells.ANCESTRAL, "each": 3}
    apart, alike = (
        np.mean(study.run(Cell(cells.PARTICLES[name], **sitting))["apart"])
        for name in ("cfg 4", "cfg 4, fkc")
    )
    assert alike < apart


def test_what_a_perturbation_moves_is_told_from_the_same_without_it(study: Study) -> None:
    found = study.run(Cell(cells.beside(UNGUIDED, "autoguidance"), steps=FEW))
    nothing = study.run(Cell(cells.beside(UNGUIDED, "autoguidance", scale=0.0), steps=FEW))
    assert min(found["moved"]) > 0.01
    assert max(nothing["moved"]) < 1e-4
    assert "moved" not in study.run(Cell(UNGUIDED, steps=FEW))


def test_other_seeds_give_other_pictures_of_the_same_captions(study: Study) -> None:
    found = study.run(Cell(UNGUIDED, "again", FEW))
    assert len(found["apart"]) == SIZES.again
    assert all(apart > 0.1 for apart in found["apart"])


def test_the_truth_is_right_and_near_itself(trained_study: Study) -> None:
    truth = trained_study.truth(0)
    drawn = trained_study.run(Cell(cfg(2.0), steps=FEW))
    assert truth["right"] == [1] * 2
    assert truth["frechet"] < drawn["frechet"]
    assert drawn["beyond"][0] == pytest.approx(drawn["frechet"] - truth["frechet"])


def test_sitters_are_the_same_captions_whatever_they_sit_for() -> None:
    sitters = Sitters(4, 2, 1)
    plain, again = sitters.of("captions", 0), sitters.of("again", 0)
    assert [one.prompt for one in again] == [one.prompt for one in plain[:2]]
    assert {one.seed for one in again}.isdisjoint(one.seed for one in plain)
    assert [len(one.claim.things) for one in plain] == [1, 2, 1, 2]
    assert sitters.of("two", 0) == plain[1::2]
    assert {one.prompt for one in plain}.isdisjoint(one.prompt for one in sitters.of("captions", 1))
    avoiding = sitters.of("avoiding", 0)
    assert all(one.negative == WHITE and one.claim.background is None for one in avoiding)


def test_every_cell_is_there_once_and_what_is_timed_is_drawn() -> None:
    keys = [key_of(cell.of("weights", 4)) for cell in all_cells()]
    assert len(set(keys)) == len(keys)
    drawn = [cell.guidance for cell in all_cells() if cell.sitting == "captions"]
    assert all(guidance in drawn for guidance in RATED.values())


def test_the_study_resumes_and_writes_its_page(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    thin_folder: Path,
    sketches: list[Path],
) -> None:
    monkeypatch.setattr("studies.guidance.__main__.MODEL_FOLDER", thin_folder)
    few = [
        Cell(UNGUIDED, steps=FEW),
        Cell(UNGUIDED, "again", FEW),
        Cell(by(BASE, "reuse"), steps=FEW),
    ]
    monkeypatch.setattr(measuring, "all_cells", lambda: iter(few))
    monkeypatch.setattr(measuring, "RATED", {"always": UNGUIDED})
    data, page, images = (tmp_path / name for name in ("d.jsonl", "page.md", "images"))
    arguments = ["--data", data, "--page", page, "--images", images, "--kept", tmp_path / "kept"]
    arguments += ["--rows", 8]
    for name in ("captions", "again", "true_pictures", "known_pictures", "rated_images", "rounds"):
        arguments += [f"--{name.replace('_', '-')}", getattr(SIZES, name)]
    main([str(argument) for argument in arguments])
    lines = data.read_text().splitlines()
    assert len(lines) == cells.BLOCKS + 4
    capsys.readouterr()
    # An interrupted run continues where it ended.
    data.write_text("\n".join(lines[:-2]) + "\n" + lines[-1] + "\n")
    monkeypatch.setattr("studies.guidance.__main__.write", lambda *_: None)
    main([str(argument) for argument in arguments])
    assert capsys.readouterr().out.count("pictures captions") == 1
    assert sorted(data.read_text().splitlines()) == sorted(lines)
    text = page.read_text()
    assert "$" not in text
    assert "| none |" in text
    assert sorted(images.glob("*.png")) == sorted(sketches)
    assert len(sketches) == 5


def test_only_captions_that_every_cell_was_drawn_for_are_compared(tmp_path: Path) -> None:
    """The second block is first complete except for its last cell, and then complete."""
    drawn = [cell for cell in all_cells() if cell.block < 2]
    records = Records(tmp_path / "results.jsonl")
    for cell in drawn[:-1]:
        records.add(cell.of("weights", 4), {"right": [0, 1, 1, 1]})
    assert Results(records).captions == 4
    records.add(drawn[-1].of("weights", 4), {"right": [1, 1, 1, 1]})
    whole = Results(records)
    found = whole.found(BASE)
    assert whole.captions == 8
    assert found is not None
    assert found.right == (6, 8)


def test_the_page_does_without_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rendering takes most of the time and does not affect results.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    write(Records(tmp_path / "none.jsonl"), tmp_path / "page.md", tmp_path / "images")
    assert (tmp_path / "page.md").read_text().startswith("# Guidance")


def test_saturation_contrast_and_clipping_are_those_of_the_picture_shown() -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    grey = torch.zeros(1, 3, 4, 4)
    beyond = 1.5 * red
    pictures = torch.cat([red, grey, beyond])
    assert measures.saturation(pictures) == pytest.approx([1.0, 0.0, 1.0])
    assert measures.clipped(pictures) == [0.0, 0.0, 1.0]
    stripes = torch.ones(1, 3, 4, 4)
    stripes[..., ::2] = -1
    assert measures.contrast(stripes) == pytest.approx([np.std([0, 1] * 8, ddof=1)])
    # An error of a tenth of the range is 20 decibels; clipped values are not errors.
    assert measures.psnr(grey + 0.2, grey) == pytest.approx([20.0], abs=1e-3)
    assert measures.psnr(beyond, red) == [measures.MAX_PSNR]


def test_the_frechet_distance_is_that_of_the_fitted_normal_distributions() -> None:
    random = np.random.default_rng(0)
    found = random.normal(size=(60, 5)) @ random.normal(size=(5, 5)) + 1
    wanted = random.normal(size=(200, 5))
    scaled = [one / wanted.std(0) for one in (found, wanted)]
    a, b = (np.cov(one.T) for one in scaled)
    apart = scaled[0].mean(0) - scaled[1].mean(0)
    by_scipy = apart @ apart + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert measures.frechet(found, wanted) == pytest.approx(by_scipy)
    assert measures.frechet(wanted, wanted) == pytest.approx(0, abs=1e-6)
    farther, deviation = measures.beyond(found, wanted[:60], wanted)
    assert 0 < deviation < farther
    assert measures.beyond(found, found, wanted) == (0, 0)


def test_a_ratio_of_means_has_its_interval() -> None:
    random = np.random.default_rng(1)
    theirs = random.uniform(1, 2, 50)
    middle, low, high = measures.ratio_of_means((2 * theirs).tolist(), theirs.tolist())
    assert (low, middle, high) == pytest.approx((2.0, 2.0, 2.0))
    noisy = theirs * random.uniform(0.5, 1.5, 50)
    middle, low, high = measures.ratio_of_means(noisy.tolist(), theirs.tolist())
    assert low < middle < high

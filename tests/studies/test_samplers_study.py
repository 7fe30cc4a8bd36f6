"""The samplers study at a tiny size: it measures correctly, resumes, and writes its page."""

import argparse
import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from samplers.dpm_solver_v3 import DPMSolverV3, Flags
from samplers.statistics import Statistics, StatisticsIdentity
from server.models.folder import revisions_of
from server.models.hosted import HostedModel
from server.models.loading import load_model
from studies.common.intervals import ratio, wilson
from studies.common.records import Records
from studies.samplers import tables
from studies.samplers.__main__ import main
from studies.samplers.cells import Cell, Contender
from studies.samplers.comparison import contender, table
from studies.samplers.convergence import solvers
from studies.samplers.measures import Bounds, relative_errors, slope
from studies.samplers.measuring import Wanted, measure
from studies.samplers.results import Results
from studies.samplers.sizes import Sizes
from studies.samplers.statistics_files import Missing, StatisticsFiles
from studies.samplers.study import Study

SIZES = Sizes(
    error_images=2,
    picture_images=2,
    accuracy_images=3,
    spaced_images=2,
    reference_steps=12,
    converged_steps=4,
    spaced_steps=6,
    known_pictures=1,
    clean_pictures=4,
)
DDIM = Contender("ddim", {"name": "ddim"})


@pytest.fixture(scope="module")
def model(thin_folder: Path) -> HostedModel:
    return load_model(thin_folder, name="embedded", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, thin_folder: Path, model: HostedModel) -> Study:
    folder = tmp_path_factory.mktemp("study")
    weights = revisions_of(thin_folder / "unet").weights
    return Study(model, weights, StatisticsFiles(folder / "none"), SIZES, folder / "kept")


def error_cell(contender: Contender, evaluations: int, scale: float = 4.0) -> Cell:
    return Cell("error", contender, "logsnr", evaluations, scale, SIZES.error_images)


def test_the_reference_has_no_error(study: Study) -> None:
    itself = Contender("unipc", {"name": "unipc", "order": 3})
    assert study.run(error_cell(itself, SIZES.reference_steps))["errors"] == [0.0, 0.0]
    converged = Cell("picture", Contender("2M", {"name": "dpm_solver_pp"}), "", 4, 4.0, 3)
    # Three images are drawn in one batch here, and two for the reference.
    assert study.run(converged)["errors"] == pytest.approx([0.0, 0.0], abs=1e-5)


def test_more_evaluations_come_closer_to_the_reference(study: Study) -> None:
    few, many = (study.run(error_cell(DDIM, n, 1.0))["errors"] for n in (2, 11))
    assert all(b < a / 2 for a, b in zip(few, many, strict=True))


def test_a_picture_is_read_and_held_against_the_range_of_clean_latents(study: Study) -> None:
    found = study.run(Cell("picture", DDIM, "", 3, 4.0, 3))
    assert len(found["errors"]) == 2
    assert len(found["beyond"]) == len(found["right"]) == 3
    assert all(0 <= share < 1 for share in found["beyond"])


def test_spacings_are_compared_over_whole_runs_to_the_clean_picture(study: Study) -> None:
    itself = Contender("unipc", {"name": "unipc", "order": 3})
    found = study.run(Cell("spacing", itself, "logsnr", SIZES.spaced_steps, 1.0, 2))
    assert found["errors"] == [0.0, 0.0]
    assert len(found["right"]) == 2
    other = study.run(Cell("spacing", itself, "time_quadratic", SIZES.spaced_steps, 1.0, 2))
    assert all(error > 0 for error in other["errors"])


def test_a_sampler_of_two_evaluations_a_step_gets_no_more_evaluations(study: Study) -> None:
    heun = Contender("heun", {"name": "heun"})
    study.run(error_cell(heun, 4))
    with pytest.raises(ValueError, match="heun has no run of 5 evaluations"):
        study.run(error_cell(heun, 5))


def test_samplers_of_ones_choice_are_compared_at_equal_evaluations(study: Study) -> None:
    chosen = [contender("ddim"), contender('{"name": "heun"}')]
    *_, first, second = table(study, chosen, ["logsnr"], [2, 3], 4.0)
    errors = study.run(error_cell(DDIM, 3))["errors"]
    assert f"{np.mean(errors):.3g} ±" in first
    assert first.startswith("| ddim | logsnr | ")
    # Heun's method has runs of 2, 4, 6, ... evaluations to a level with noise.
    assert second.endswith("| no such run |")
    against = study.run(error_cell(Contender("heun", {"name": "heun"}), 2))["errors"]
    middle, low, high = ratio(study.run(error_cell(DDIM, 2))["errors"], against)
    assert f"({middle:.2f}, {low:.2f} to {high:.2f})" in second


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nobody", "no sampler 'nobody' is registered"),
        ('{"name": "ddim", "eta": 2}', "less than or equal to 1"),
        ('{"name": ', "Expecting value"),
    ],
)
def test_a_sampler_that_cannot_be_compared_is_refused(text: str, said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        contender(text)


def test_what_does_not_exist_is_missing(study: Study) -> None:
    with pytest.raises(Missing, match="no sampler 'nothing'"):
        study.run(error_cell(Contender("nothing", {"name": "nothing"}), 4))
    with pytest.raises(Missing, match="no statistics of guidance scale 4"):
        study.run(error_cell(Contender("v3", {"name": "dpm_solver_v3"}, "elementwise"), 4))


def test_statistics_are_found_by_their_scale(tmp_path: Path) -> None:
    files = StatisticsFiles(tmp_path)
    lam = np.linspace(-5, 5, 7)
    for rule, scale in (("none", 1.0), ("cfg", 4.0)):
        identity = StatisticsIdentity("m", "s", 1.0, 0.0, rule, scale, (4, 2, 2), 8, 7)
        ones = np.full((7, 4, 2, 2), scale)
        Statistics(lam, ones, ones, ones, identity).save(tmp_path / f"ems-{scale:g}.safetensors")
    found = files.find("elementwise", 4.0, (4, 2, 2))
    assert found is not None
    assert found.l.shape == (7, 4, 2, 2)
    assert found.l.max() == 4.0
    averaged = files.find("per channel", 1.0, (4, 2, 2))
    assert averaged is not None
    assert averaged.l.shape == (7, 4, 1, 1)
    assert files.find("", 2.0, (4, 2, 2)) is None
    assert files.name_of("elementwise", 1.0) != files.name_of("elementwise", 4.0)


def test_the_study_writes_its_page_and_resumes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    thin_folder: Path,
    study: Study,
    model: HostedModel,
    sketches: list[Path],
) -> None:
    monkeypatch.setattr("studies.samplers.__main__.MODEL_FOLDER", thin_folder)
    data, page, images = (tmp_path / name for name in ("d.jsonl", "page.md", "images"))
    arguments = [
        *("--data", data, "--page", page, "--images", images, "--kept", tmp_path / "kept"),
        *("--parts", "error", "--contenders", "ddim", "--scales", 1, "--evaluations", 5),
        *("--error-images", 2, "--reference-steps", 12, "--known-pictures", 1),
    ]
    main([str(argument) for argument in arguments])
    lines = data.read_text().splitlines()
    assert [json.loads(line)["of"]["spacing"] for line in lines] == ["logsnr", "linspace"]
    assert np.mean(json.loads(lines[0])["errors"]) > 0
    text = page.read_text()
    assert "| ddim |" in text
    assert "$" not in text
    assert sorted(images.glob("*.png")) == sorted(sketches)
    assert len(sketches) == 5
    # Results in the file are not measured again; missing ones are.
    wanted = Wanted(("error",), ("ddim",), (1.0,), (5, 6))
    records = Records(data)
    capsys.readouterr()
    for measured in (2, 0):
        measure(study, model, model, StatisticsFiles(tmp_path), records, wanted, 1.0)
        assert capsys.readouterr().out.count("error ddim") == measured
    assert data.read_text().splitlines()[:2] == lines


def test_the_tables_do_without_results(tmp_path: Path) -> None:
    results = Results(Records(tmp_path / "none.jsonl"))
    assert set(tables.which(results).splitlines()[2].split(" | ")[1:-1]) == {tables.NO_VALUE}
    assert tables.regret(results).count("\n") == 1
    assert set(tables.spacings(results, 4.0).splitlines()[2].split(" | ")[2:-1]) == {
        tables.NO_VALUE
    }
    assert set(tables.spacing_ratios(results).splitlines()[2].split(" | ")[1:-1]) == {
        tables.NO_VALUE
    }
    assert set(tables.orders(results).splitlines()[2].split(" | ")[1:-1]) == {tables.NO_VALUE}


def test_what_slopes_are_of_is_left_to_no_preset() -> None:
    """Otherwise a change of the preset would list old figures under new settings."""
    fitted = [one for one in solvers() if isinstance(one, DPMSolverV3)]
    assert {one.corrector for one in fitted} >= {"none", "exact", "pseudo"}
    assert all(getattr(one, flag) is not None for one in fitted for flag in Flags._fields)


def test_records_are_found_whatever_the_order_of_their_entries(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Records(path).add({"a": 1, "b": 2.5}, {"errors": [0.123456789]})
    again = Records(path)
    assert {"b": 2.5, "a": 1} in again
    assert {"b": 2.5, "a": 2} not in again
    assert next(iter(again))["errors"] == [0.12346]


def test_an_error_is_relative_to_the_size_of_the_reference() -> None:
    reference = torch.full((2, 1, 2, 2), 2.0)
    x = reference + torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    assert relative_errors(x, reference) == [0.0, 0.5]


def test_elements_beyond_the_range_are_counted_per_channel() -> None:
    clean = torch.stack([torch.linspace(-1, 1, 1001), torch.linspace(-3, 3, 1001)])
    bounds = Bounds.of(clean.view(1, 2, 1, 1001), 0.01)
    assert bounds.low == pytest.approx((-0.98, -2.94))
    assert bounds.high == pytest.approx((0.98, 2.94))
    x = torch.tensor([[0.0, 0.99], [-2.9, float("nan")]]).view(1, 2, 1, 2)
    assert bounds.beyond(x) == [0.5]


def test_intervals_cover_what_they_should() -> None:
    low, high = wilson(0, 10)
    # By the formula at no successes: z^2 / (n + z^2).
    z = NormalDist().inv_cdf(0.975)
    assert low == pytest.approx(0, abs=1e-12)
    assert high == pytest.approx(z**2 / (10 + z**2), abs=1e-3)
    middle, low, high = ratio([2.0, 8.0], [1.0, 2.0])
    assert middle == pytest.approx(8**0.5)
    assert low < middle < high


def test_the_slope_is_the_power() -> None:
    counts = (10, 20, 40)
    assert slope(counts, [n**-2.5 for n in counts]) == pytest.approx(2.5)

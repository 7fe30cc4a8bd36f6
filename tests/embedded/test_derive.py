"""Files derived from the embedded model's weights can be recomputed, and belong to the weights."""

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embedded import MODEL_FOLDER
from embedded.classifier_training import HEADS, Labeled
from embedded.derive import (
    FITTED,
    JUDGED_AT,
    SCALES,
    main,
    make_classifier,
    make_linear_ag,
    pictures,
    stale_classifier,
    stale_linear_ag,
    stale_statistics,
)
from samplers import Statistics
from server.models.classifier import LatentClassifier
from server.models.folder import classifier_file, statistics_file
from server.models.hosted import HostedModel
from server.models.loading import load_model
from tests.covering import EVERY_CELL
from tests.server.thin_model import save_thin_model


@pytest.fixture(scope="module")
def model() -> HostedModel:
    """The shipped model, for tests that do not modify it."""
    return load_model(MODEL_FOLDER, name="m", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def thin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with thin networks of random weights, for which files are derived as well."""
    folder = tmp_path_factory.mktemp("thin") / "model"
    save_thin_model(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, thin_folder: Path) -> Path:
    """A copy of the thin model without derived files."""
    derived = shutil.ignore_patterns("ems-*.safetensors", "linear-ag-*.safetensors")
    return shutil.copytree(thin_folder, tmp_path / "model", ignore=derived)


@pytest.fixture
def derive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command in this process, which has already imported torch; gives its exit status."""
    command = ["derive", "statistics", "--model", str(folder), "--out", str(folder.parent / "out")]

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [*command, "--points", "3", "--samples", "2", *arguments])
        return main()

    return run


def test_what_ships_belongs_to_the_weights(model: HostedModel) -> None:
    assert not stale_statistics(model, MODEL_FOLDER)
    for scale in SCALES:
        rule = "none" if scale == 1 else "cfg"
        found = Statistics.load(statistics_file(MODEL_FOLDER, rule, scale))
        assert found.identity is not None
        assert (found.identity.rule, found.identity.scale) == (rule, scale)
        assert found.l.shape[1:] == found.identity.shape == model.latent_shape(128, 128)
        # l is the fraction of x in the noise prediction: 1 at pure noise.
        assert found.l[0].mean() == pytest.approx(1, abs=0.05)


def test_statistics_are_remade_by_one_command_and_go_stale_with_the_weights(
    folder: Path, derive: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert derive("--check") == 1
    assert "`python -m embedded.derive` makes it again" in capsys.readouterr().out
    assert derive() == 0
    assert "statistics: 6 of 6" in capsys.readouterr().out
    assert derive("--check") == 0

    file = next(folder.glob("unet/*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert derive("--check") == 1
    assert capsys.readouterr().out.count("statistics are for model revision") == len(SCALES)


def test_linear_guidance_is_fitted_by_one_command_and_goes_stale_with_the_weights(
    folder: Path, model: HostedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not stale_linear_ag(model, MODEL_FOLDER)
    shipped = {file.name for file in (MODEL_FOLDER / "weft").glob("linear-ag-*")}
    assert len(shipped) == len(FITTED)
    runs = FITTED if EVERY_CELL else FITTED[-1:]
    monkeypatch.setattr("embedded.derive.FITTED", runs)
    copied = load_model(folder, name="m", device="cpu", dtype="float32")
    assert len(stale_linear_ag(copied, folder)) == len(runs)
    make_linear_ag(copied, Namespace(model=folder, runs=1))
    assert not stale_linear_ag(copied, folder)
    made = {file.name for file in (folder / "weft").glob("linear-ag-*")}
    assert len(made) == len(runs)
    assert made <= shipped
    copied.facts = replace(copied.facts, denoiser="0123456789abcdef")
    assert len(stale_linear_ag(copied, folder)) == len(runs)


def test_a_classifier_is_made_by_one_command_and_goes_stale_with_the_weights(
    folder: Path, model: HostedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not stale_classifier(model, MODEL_FOLDER)
    shipped = LatentClassifier.load(classifier_file(MODEL_FOLDER))
    options = Namespace(model=folder, out=folder.parent / "out", labelled=16, steps=2)
    make_classifier(model, options)
    assert capsys.readouterr().out.count("timestep") == len(JUDGED_AT)
    made = LatentClassifier.load(classifier_file(folder))
    assert made.heads == shipped.heads == HEADS
    assert not stale_classifier(model, folder)
    # Again, now from the pictures that are already labeled: bit-identical.
    labelled = Labeled.load(next(options.out.glob("labelled-*")))
    assert len(labelled.latents) == 16
    make_classifier(model, options)
    again = LatentClassifier.load(classifier_file(folder)).state_dict()
    assert all(torch.equal(again[name], value) for name, value in made.state_dict().items())

    made.model = "0123456789abcdef"
    made.save(classifier_file(folder))
    [sentence] = stale_classifier(model, folder)
    assert sentence.startswith("its classifier is for model revision 0123456789abcdef, but the")
    assert "`python -m embedded.derive classifier` makes it again" in sentence


def test_unknown_parts_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["derive", "everything"])
    with pytest.raises(SystemExit) as refusal:
        main()
    assert refusal.value.code == 2
    assert "everything is no part; there are statistics" in capsys.readouterr().err


def test_pictures_come_encoded_with_their_captions(model: HostedModel) -> None:
    found = pictures(model, 3)
    assert found.latents.shape == (3, *model.latent_shape(128, 128))
    assert len(set(found.prompts)) == 3
    with torch.inference_mode():
        assert model.decode(found.latents).isfinite().all()

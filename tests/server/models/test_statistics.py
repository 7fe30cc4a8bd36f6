"""Which statistics of a model exist, and which of them a request gets."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from samplers import NoiseSchedule, Statistics, StatisticsIdentity
from samplers.statistics import schedule_fingerprint
from server.errors import InvalidRequest
from server.models.folder import statistics_file
from server.models.statistics import ModelStatistics

SCHEDULE = NoiseSchedule.from_diffusers({})
REVISION = "0123456789abcdef"
SHAPE = (4, 2, 2)


def stored(folder: Path, rule: str, scale: float, revision: str = REVISION) -> Path:
    identity = StatisticsIdentity(
        revision,
        schedule_fingerprint(SCHEDULE),
        999.0,
        0.0,
        rule,
        scale,
        SHAPE,
        samples=8,
        points=3,
    )
    l, s, b = np.full((3, 3, *SHAPE), scale)  # noqa: E741
    file = statistics_file(folder, rule, scale)
    Statistics(np.arange(3.0), l, s, b, identity).save(file)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rule, scale in (("none", 1.0), ("cfg", 2.0), ("cfg", 7.5)):
        stored(tmp_path, rule, scale)
    return tmp_path


def read(folder: Path) -> ModelStatistics:
    return ModelStatistics.of(folder, REVISION, SCHEDULE)


def test_exact_ones_are_of_the_rule_and_scale(folder: Path) -> None:
    found = read(folder)
    assert found.available == ("none", "cfg 2", "cfg 7.5")
    assert found.exact("cfg", 7.5).scale == 7.5
    assert found.exact("none", 1.0).rule == found.exact("cfg", 1.0).rule == "none"
    with pytest.raises(InvalidRequest) as refused:
        found.exact("cfg", 4.0)
    assert refused.value.field == "sampler.statistics"
    assert refused.value.message == (
        "sampler.statistics is 'exact', but this model has no statistics for guidance 'cfg 4', "
        "only for none, cfg 2, cfg 7.5; compute them with `weft ems --model FOLDER --guidance cfg "
        "--scale 4`, or choose 'nearest' or 'none'."
    )


@pytest.mark.parametrize(
    ("scale", "nearest"), [(0.0, 1.0), (1.3, 1.0), (1.5, 2.0), (3.8, 2.0), (3.9, 7.5), (30.0, 7.5)]
)
def test_the_nearest_is_so_by_the_logarithm(folder: Path, scale: float, nearest: float) -> None:
    assert read(folder).nearest(scale).scale == nearest


def test_arrays_come_elementwise_at_their_size_and_per_channel_at_others(folder: Path) -> None:
    found = read(folder)
    identity = found.exact("cfg", 2.0)
    assert found.load(identity, SHAPE).l.shape == (3, *SHAPE)
    assert found.load(identity, (4, 8, 8)).l.shape == (3, 4, 1, 1)
    assert found.load(identity, SHAPE) is found.load(identity, SHAPE)
    with pytest.raises(InvalidRequest, match="4 latent channels, but the latent has 16"):
        found.load(identity, (16, 8, 8))


def test_a_file_that_is_gone_or_spoilt_is_refused_when_it_is_wanted(folder: Path) -> None:
    found = read(folder)
    identity = found.exact("cfg", 2.0)
    statistics_file(folder, "cfg", 2.0).write_bytes(b"spoilt")
    with pytest.raises(InvalidRequest, match=r"`weft ems --model FOLDER --guidance cfg --scale 2`"):
        found.load(identity, SHAPE)


def test_a_refusal_names_the_file_and_not_its_folder(folder: Path) -> None:
    spoilt = statistics_file(folder, "cfg", 4.0)
    spoilt.write_bytes(b"\x08")
    statistics = read(folder)
    with pytest.raises(InvalidRequest) as stale:
        statistics.exact("cfg", 4.0)
    assert spoilt.name in stale.value.message
    assert str(folder) not in stale.value.message
    identity = statistics.exact("cfg", 2.0)
    gone = statistics_file(folder, "cfg", 2.0)
    gone.unlink()
    with pytest.raises(InvalidRequest) as missing:
        statistics.load(identity, SHAPE)
    assert gone.name in missing.value.message
    assert str(folder) not in missing.value.message


def test_files_of_other_weights_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored(tmp_path, "cfg", 4.0, revision="feedfeedfeedfeed")
    closed = statistics_file(tmp_path, "cfg", 3.0)
    replace(Statistics.load(stored(tmp_path, "cfg", 3.0)), identity=None).save(closed)
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path)
    assert "belongs to no model" in caplog.text
    assert "for model revision feedfeedfeedfeed, but the model's is 0123" in caplog.text
    assert found.available == ()
    with pytest.raises(
        InvalidRequest, match=r"for model revision feed.* computed again; compute them with"
    ):
        found.exact("cfg", 4.0)
    with pytest.raises(InvalidRequest, match=r"no statistics at all.*or choose 'none'\.$"):
        found.nearest(4.0)


def test_a_model_without_any_says_how_to_make_them(tmp_path: Path) -> None:
    found = read(tmp_path)
    with pytest.raises(InvalidRequest, match=r"`weft ems .* --guidance none`, or choose 'none'"):
        found.exact("none", 1.0)
    assert found.refusal("the rule 'apg'").message == (
        "sampler.statistics is 'exact', but there are no statistics for the rule 'apg'; choose "
        "'none'."
    )

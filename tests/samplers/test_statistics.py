"""The statistics' file, their other shapes, and invalid values."""

import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from samplers.statistics import Statistics, StatisticsIdentity, read_identity, schedule_fingerprint
from tests.samplers.cases import DISCRETE, EDM, FLOW, SCHEDULES, VP

IDENTITY = StatisticsIdentity(
    model="0123456789abcdef",
    schedule=schedule_fingerprint(DISCRETE),
    t_start=999.0,
    t_end=0.0,
    rule="cfg",
    scale=7.5,
    shape=(4, 3, 2),
    samples=16,
    points=5,
)


@pytest.fixture
def statistics() -> Statistics:
    rng = np.random.default_rng(0)
    l, s, b = rng.standard_normal((3, 5, 4, 3, 2)).astype(np.float32).astype(np.float64)  # noqa: E741
    return Statistics(np.linspace(-5, 4.6, 5), l, s, b, IDENTITY)


def test_a_file_gives_back_what_was_saved(statistics: Statistics, tmp_path: Path) -> None:
    file = tmp_path / "weft" / "ems.safetensors"
    statistics.save(file)
    read = Statistics.load(file)
    assert read.identity == read_identity(file) == IDENTITY
    for name in ("half_log_snr", "l", "s", "b"):
        assert np.array_equal(getattr(read, name), getattr(statistics, name))
        assert getattr(read, name).dtype == np.float64
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_may_be_read_by_whom_the_umask_lets(
    statistics: Statistics, tmp_path: Path, mode_of_files: int
) -> None:
    file = tmp_path / "ems.safetensors"
    statistics.save(file)
    assert stat.S_IMODE(file.stat().st_mode) == mode_of_files


def test_closed_forms_have_no_identity(statistics: Statistics, tmp_path: Path) -> None:
    file = tmp_path / "closed.safetensors"
    replace(statistics, identity=None).save(file)
    assert read_identity(file) is None
    assert Statistics.load(file).identity is None


def test_other_sizes_get_the_channels_means(statistics: Statistics) -> None:
    assert statistics.for_shape((4, 3, 2)) is statistics
    other = statistics.for_shape((4, 8, 8))
    assert other.l.shape == (5, 4, 1, 1)
    assert np.allclose(other.b[:, 1, 0, 0], statistics.b[:, 1].reshape(5, -1).mean(1))
    assert np.array_equal(other.for_shape((4, 16, 16)).s, other.s)


def test_scalars_serve_every_shape() -> None:
    flat = Statistics(np.arange(3.0), np.ones(3), np.zeros(3), np.zeros(3))
    assert flat.for_shape((4, 8, 8)) is flat
    assert flat.per_channel() is flat


def test_other_channels_are_refused(statistics: Statistics) -> None:
    with pytest.raises(ValueError, match="4 latent channels, but the latent has 16"):
        statistics.for_shape((16, 3, 2))


def test_statistics_of_another_model_or_schedule_are_refused() -> None:
    IDENTITY.check(IDENTITY.model, IDENTITY.schedule)
    with pytest.raises(
        ValueError, match="for model revision 0123456789abcdef, but the model's is f"
    ):
        IDENTITY.check("f", IDENTITY.schedule)
    with pytest.raises(ValueError, match="for noise schedule DiscreteVP-"):
        IDENTITY.check(IDENTITY.model, schedule_fingerprint(FLOW))


def test_fingerprints_tell_schedules_apart() -> None:
    assert len({schedule_fingerprint(schedule) for schedule in SCHEDULES.values()}) == len(
        SCHEDULES
    )
    assert schedule_fingerprint(EDM).startswith("EDM-")
    assert schedule_fingerprint(VP) == schedule_fingerprint(VP.vp_linear())


def test_what_holds_no_statistics_is_refused(statistics: Statistics, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"not at all")
    with pytest.raises(ValueError, match="cannot be read"):
        Statistics.load(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_identity(tmp_path / "missing.safetensors")
    save_file({"l": np.zeros(3)}, file)
    with pytest.raises(ValueError, match="contains no statistics in the format"):
        read_identity(file)
    save_file({"l": np.zeros(3)}, file, {"format": "weft.statistics.1"})
    with pytest.raises(ValueError, match="is incomplete"):
        Statistics.load(file)
    save_file({"l": np.zeros(3)}, file, {"format": "weft.statistics.1", "identity": '{"shape": 3}'})
    with pytest.raises(ValueError, match="does not say what its statistics belong to"):
        Statistics.load(file)
    arrays = {n: torch.zeros(3, dtype=torch.bfloat16) for n in ("half_log_snr", "l", "s", "b")}
    save_tensors(arrays, file, {"format": "weft.statistics.1"})
    with pytest.raises(ValueError, match="is incomplete"):
        Statistics.load(file)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"half_log_snr": np.arange(5.0)[::-1].copy()}, "half_log_snr must rise"),
        ({"s": np.zeros((4, 4, 3, 2))}, r"shapes \(5, 4, 3, 2\), \(4, 4, 3, 2\), .* the 5 points"),
        ({"b": np.full((5, 4, 3, 2), np.nan)}, "b has values that are not finite"),
        ({"half_log_snr": np.array([0, 1, 2, 3, np.nan])}, "half_log_snr has values that are not"),
        (dict.fromkeys(("half_log_snr", "l", "s", "b"), np.zeros(0)), "half_log_snr is empty"),
    ],
)
def test_spoilt_arrays_are_refused(
    statistics: Statistics, tmp_path: Path, change: dict[str, np.ndarray], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        replace(statistics, **change)
    file = tmp_path / "x.safetensors"
    arrays = {name: getattr(statistics, name) for name in ("half_log_snr", "l", "s", "b")}
    save_file(arrays | change, file, {"format": "weft.statistics.1"})
    with pytest.raises(ValueError, match=rf"statistics file '.*' is unusable: .*{says}"):
        Statistics.load(file)

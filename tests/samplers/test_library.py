"""The package as a library: its names, its entry points, and runs in every dtype."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import samplers
from guidance import RULES
from samplers import DDIM, SAMPLERS, SPACINGS, NoiseSchedule, UniPC, integrate
from samplers.gaussian import GaussianDenoiser
from tests.samplers.cases import EDM, FLOW, VP

PLUGIN = """
from typing import ClassVar, Literal

from samplers import DDIM, Columns, Grid, Plan, Sampler, Spacing, Trailing


class Mine(DDIM, frozen=True):
    name: Literal["mine"] = "mine"


class Layout(Trailing, frozen=True):
    name: Literal["layout"] = "layout"
"""
ENTRY_POINTS = "[weft.samplers]\nmine = plugin:Mine\n[weft.spacings]\nlayout = plugin:Layout\n"


def test_every_class_of_ours_is_a_name_of_the_package() -> None:
    for kind in (*SAMPLERS, *SPACINGS):
        if kind.__module__.startswith("samplers."):
            assert kind.__name__ in samplers.__all__
            assert getattr(samplers, kind.__name__) is kind


def test_every_name_of_the_package_is_there() -> None:
    for name in samplers.__all__:
        assert getattr(samplers, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compute_weather'"):
        _ = samplers.compute_weather


def test_the_library_needs_no_torch_to_build_plans() -> None:
    code = (
        "import sys; from samplers import NoiseSchedule, UniPC\n"
        "from samplers.names import named\n"
        "UniPC().plan(NoiseSchedule.flow().grid('beta', 5)); named('DPM++ 2M Karras')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("first", ["samplers", "plugin", "samplers.noise_schedule"])
def test_classes_of_installed_packages_join_whatever_is_imported_first(
    tmp_path: Path, first: str
) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    described = tmp_path / "plugin-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(ENTRY_POINTS)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {first}\n"
        "from samplers import SAMPLERS, NoiseSchedule\n"
        "print(SAMPLERS[-1].__name__, NoiseSchedule.flow().grid('layout', 4).t.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Mine [1.0, 0.75, 0.5, 0.25, 0.0]"


SUBCLASS = """
from typing import Literal
from samplers import DDIM
class Mine(DDIM, arbitrary_types_allowed=True):
    {}
"""

BROKEN = {
    "raises": "raise RuntimeError('a bad day')",
    "exits": "raise SystemExit('no licence')",
    "absent": "",
    "no_sampler": "class Mine: ...",
    "taken": "from samplers import DDIM as Mine",
    "unnamed": SUBCLASS.format('name: str = "unnamed"'),
    "needy": SUBCLASS.format('name: Literal["needy"] = "needy"; strength: float'),
    "listed": SUBCLASS.format('name: Literal["listed"] = "listed"; weights: list[float] = [1.0]'),
    "unwritten": SUBCLASS.format('name: Literal["unwritten"] = "unwritten"; of: range = range(1)'),
}


def test_a_plug_in_that_cannot_be_used_is_named_and_left_out(tmp_path: Path) -> None:
    described = tmp_path / "plugin-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (tmp_path / "fine.py").write_text(PLUGIN)
    groups = ["[weft.samplers]", *(f"{name} = {name}:Mine" for name in (*BROKEN, "fine"))]
    groups += ["[weft.guidance_rules]", "raises = raises:Mine"]
    (described / "entry_points.txt").write_text("\n".join(groups))
    for name, source in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(source)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from samplers import SAMPLERS; from guidance import RULES\n"
        "print(SAMPLERS[-1].__name__, len({kind.__name__ for kind in SAMPLERS}), len(RULES))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Mine", str(len(SAMPLERS) + 1), str(len(RULES))]
    warnings = done.stderr.strip().splitlines()
    assert [line.partition(" of plugin is left out: ")[0] for line in warnings] == [
        *(f"weft.samplers {name!r}" for name in BROKEN),
        "weft.guidance_rules 'raises'",
    ]
    for said in (
        "a bad day",
        "SystemExit: no licence",
        "no attribute 'Mine'",
        "not a subclass",
        "'ddim' is taken",
        "its field name must be a Literal",
        "strength Field required",
        "unhashable type: 'list'",
        "PydanticInvalidForJsonSchema",
    ):
        assert said in done.stderr


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 0.1),
        (torch.float16, 0.02),
    ],
    ids=str,
)
def test_a_run_is_in_the_type_of_its_start(dtype: torch.dtype, tolerance: float) -> None:
    plan = DDIM().plan(VP.grid("logsnr", 10, 1.0, 1e-3))
    start = torch.linspace(-1, 1, 9, dtype=torch.float64)[None]
    denoise = GaussianDenoiser(VP, 0.3, 0.5)
    landed = integrate(plan, denoise, start.to(dtype))
    assert landed.dtype == dtype
    # The tables applied by hand.
    x = start.numpy()
    for i, table in enumerate(plan.tables):
        x = table[0, 0] * x + table[0, 1] * denoise(torch.from_numpy(x), plan.t[i]).numpy()
    np.testing.assert_allclose(landed.double().numpy(), x, atol=tolerance)


@pytest.mark.parametrize(
    ("schedule", "t_start", "t_end"), [(VP, 1.0, 0.2), (FLOW, 0.95, 0.3), (EDM, 40.0, 0.5)]
)
def test_a_run_ends_where_its_grid_does(
    schedule: NoiseSchedule, t_start: float, t_end: float
) -> None:
    denoise = GaussianDenoiser(schedule, 0.3, 0.5)
    grid = schedule.grid("logsnr", steps=60, t_start=t_start, t_end=t_end)
    plan = UniPC(order=3, lower_order_final=False).plan(grid)
    assert (plan.t[-1], plan.sigma[-1]) == (grid.t[-1], grid.sigma[-1])
    assert grid.sigma[-1] == pytest.approx(float(schedule.level(np.array(t_end))[1]))
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[None]
    landed = integrate(plan, denoise, start)
    exact = denoise.transport(start, t_start, t_end)
    torch.testing.assert_close(landed, exact, rtol=0, atol=1e-5)

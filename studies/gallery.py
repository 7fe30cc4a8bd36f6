"""Draw the picture grids of docs/gallery.md: one per rule, scale and sampler, one for policies.

    python -m studies.gallery            # draw what is missing, write docs/images/gallery/

Every picture is a request to the server's engine and is stored in ``out/gallery``, so that an
interrupted run can be continued. All grids have the same three captions and seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.engine_runs import run_tasks, start_engine
from embedded import MODEL_FOLDER, STUDENT_FOLDER
from server.models.loading import load_model
from server.requests.resolve import make_plan, prepare, resolve, statistics_for
from server.requests.schema import GenerateRequest
from server.requests.tasks import tasks_of
from server.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from server.engine.engine import Engine
    from server.models.hosted import HostedModel

CAPTIONS = (
    ("a small cyan ring on a black background", 3),
    ("a blue square to the left of a yellow circle", 2),
    ("a green triangle at sunset", 5),
)
"""Captions, each with its seed."""
STEPS = 25
SCALES = (1.5, 2.0, 4.0, 7.5, 12.0, 20.0)
COMMON_SCALES = (2.0, 4.0, 7.5, 12.0, 20.0)
SAMPLER_STEPS = (4, 6, 8, 12, 25)
DISTILLED_STEPS = (1, 2, 4, 8)
ROWS = 32
"""Rows of a forward pass."""
AT_ONCE = 48
"""Number of requests that are in the engine at the same time."""

OF_ONE_SCALE = (
    "cfg",
    "apg",
    "cfg_rescale",
    "cfg_zero_star",
    "dynamic_thresholding",
    "tcfg",
    "magnitude_aware",
)
SAMPLERS = (
    *("ddim", "euler", "euler_ancestral", "heun", "dpm_2", "dpm_fast", "dpm_solver_pp"),
    *("dpm_solver_pp_singlestep", "dpm_solver_pp_sde", "unipc", "dpm_solver_v3", "deis", "plms"),
    *("hb", "nesterov", "ghvb", "gradient_estimation", "lms", "heunpp2", "seeds", "er_sde"),
    *("sa_solver", "sa_solver_pece", "score_sde_pc", "restart"),
)
DISTILLED = ("lcm", "tcd")
POLICIES = ("always", "interval", "adaptive", "linear_adaptive", "reuse")

EDGE = 4
LINE = 20
"""Pixels between cells (EDGE), and height of a line of text in pixels (LINE)."""
TEXT = 13
PAPER, INK = (255, 255, 255), (40, 40, 40)
QUALITY = 82

Request = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sheet:
    """One grid, with a row for each caption and a column for each setting.

    Attributes:
        name: name of the file.
        columns: request fields besides caption and seed, by the column's label.
    """

    name: str
    columns: Mapping[str, Request]

    def requests(self) -> list[list[Request]]:
        """The requests of each row."""
        return [
            [{"prompt": caption, "seed": seed, **asked} for asked in self.columns.values()]
            for caption, seed in CAPTIONS
        ]


def all_sheets() -> list[Sheet]:
    """All grids."""
    return [*_rules(), *_scales(), *_samplers(), _policies()]


def _guided(name: str, scale: float, **settings: Any) -> Request:
    return {"steps": STEPS, "guidance": {"name": name, "scale": scale, **settings}}


def _rules() -> list[Sheet]:
    none = {"no guidance": {"steps": STEPS, "guidance": "none"}}
    plain = [
        Sheet(f"rule-{name}", {**none, **{f"{s:g}": _guided(name, s) for s in SCALES}})
        for name in OF_ONE_SCALE
    ]
    plus = {f"{s:g}": _guided("cfg_plus_plus", s) for s in (0.2, 0.4, 0.6, 0.8, 1.0)}
    decoupled = {
        f"{low:g}, detail {high:g}": _guided("frequency_decoupled", low, scale_high=high)
        for low, high in ((2.0, 4.0), (4.0, 2.0), (4.0, 8.0), (8.0, 4.0), (12.0, 12.0))
    }
    negative = {"negative_prompt": "a blue square"}
    away = {
        f"{rule} {scale:g}": {**negative, **_guided(rule, scale)}
        for scale in (2.0, 4.0, 7.5)
        for rule in ("cfg", "perp_neg")
    }
    star = [{"prompt": "a red star", "weight": 1.0}]
    composed = {f"{s:g}": _guided("composed", s, prompts=star) for s in SCALES}
    return [
        *plain,
        Sheet("rule-cfg_plus_plus", {**none, **plus}),
        Sheet("rule-frequency_decoupled", {**none, **decoupled}),
        Sheet("rule-perp_neg", away),
        Sheet("rule-composed", {**none, **composed}),
    ]


def _scales() -> list[Sheet]:
    return [
        Sheet(f"scale-{scale:g}", {name: _guided(name, scale) for name in OF_ONE_SCALE})
        for scale in COMMON_SCALES
    ]


def _samplers() -> list[Sheet]:
    guidance = {"name": "cfg", "scale": 4.0}
    solvers = [
        Sheet(
            f"sampler-{name}",
            {
                f"{steps} steps": {"sampler": name, "steps": steps, "guidance": guidance}
                for steps in SAMPLER_STEPS
            },
        )
        for name in SAMPLERS
    ]
    distilled = [
        Sheet(
            f"sampler-{name}",
            {
                f"{steps} step{'s' * (steps > 1)}": {
                    "model": "embedded-lcm",
                    "sampler": name,
                    "steps": steps,
                }
                for steps in DISTILLED_STEPS
            },
        )
        for name in DISTILLED
    ]
    return [*solvers, *distilled]


def _policies() -> Sheet:
    none = {"no guidance": {"steps": STEPS, "guidance": "none"}}
    policies = {name: _guided("cfg", 4.0, policy=name) for name in POLICIES}
    return Sheet("policies", {**none, **policies})


class Pictures:
    """The pictures of requests, each drawn once.

    Args:
        folder: folder where they are stored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, request: Request) -> Image.Image:
        """The picture of a request that has been drawn."""
        return Image.open(self.path(request)).convert("RGB")

    def draw(self, requests: Sequence[Request]) -> None:
        """Draw the pictures that are missing."""
        folders = {"embedded": MODEL_FOLDER, "embedded-lcm": STUDENT_FOLDER}
        for name, folder in folders.items():
            missing = {
                self.path(request): request
                for request in requests
                if request.get("model", "embedded") == name and not self.path(request).exists()
            }
            if not missing:
                continue
            model = load_model(folder, name=name, device="cpu", dtype="float32")
            engine = start_engine(model, ROWS, 4096)
            try:
                todo = list(missing.items())
                for first in range(0, len(todo), AT_ONCE):
                    self._draw(engine, model, todo[first : first + AT_ONCE])
                    print(f"{name}: {min(first + AT_ONCE, len(todo))} of {len(todo)}", flush=True)
            finally:
                engine.stop(0)

    def _draw(
        self, engine: Engine, model: HostedModel, todo: Sequence[tuple[Path, Request]]
    ) -> None:
        tasks = []
        for _, request in todo:
            asked = resolve(GenerateRequest.model_validate(request), model, Limits(), None)
            size = asked.width, asked.height
            fitted_to = statistics_for(asked, model)
            fitted = fitted_to and model.statistics.load(fitted_to, model.latent_shape(*size))
            layout = asked.sampler, asked.spacing, asked.steps, asked.strength
            plan = make_plan(model.schedule(*size, asked.steps), *layout, fitted)
            tasks += tasks_of(prepare(asked, model, plan), model)
        for index, result in run_tasks(engine, tasks).items():
            path = todo[index][0]
            fresh = path.with_suffix(".writing")
            Image.fromarray(result.pixels).save(fresh, format="PNG")
            fresh.replace(path)

    def path(self, request: Request) -> Path:
        """File that stores the picture of a request."""
        text = json.dumps(request, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.png"


def grid(sheet: Sheet, pictures: Pictures) -> Image.Image:
    """The pictures of a sheet, with the columns' labels at the top and captions above rows."""
    cells = [[pictures.of(request) for request in row] for row in sheet.requests()]
    side = cells[0][0].width + EDGE
    width = EDGE + side * len(sheet.columns)
    page = Image.new("RGB", (width, LINE + len(cells) * (side + LINE)), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for column, label in enumerate(sheet.columns):
        middle = EDGE + side * column + (side - EDGE) // 2
        draw.text((middle, LINE // 2), label, INK, font, anchor="mm")
    for row, pictures_of_row in enumerate(cells):
        top = LINE + row * (side + LINE)
        draw.text((EDGE, top + LINE // 2), CAPTIONS[row][0], INK, font, anchor="lm")
        for column, picture in enumerate(pictures_of_row):
            page.paste(picture, (EDGE + side * column, top + LINE))
    return page


def main() -> None:
    """Draw the pictures and write the grids."""
    parser = argparse.ArgumentParser(prog="python -m studies.gallery")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kept", type=Path, default=Path("out/gallery"), help="folder of pictures")
    parser.add_argument("--images", type=Path, default=Path("docs/images/gallery"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sheets, pictures = all_sheets(), Pictures(options.kept)
    pictures.draw([request for sheet in sheets for row in sheet.requests() for request in row])
    options.images.mkdir(parents=True, exist_ok=True)
    for sheet in sheets:
        page = grid(sheet, pictures)
        page.save(options.images / f"{sheet.name}.webp", quality=QUALITY, method=6)


if __name__ == "__main__":
    main()

"""Read a picture of shapes by classical image analysis, and compare it with a caption's claims.

The background is the template nearest to the picture's border; the things are the connected parts
that differ from it. A part with a hole is a ring; any other part is the shape whose outline, scaled
to the same area, overlaps it most. Color is the median of the part's interior.
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Final

import numpy as np
import torch

from embedded.scenes import (
    BACKGROUNDS,
    COLORS,
    PICTURE_SIZE,
    SHAPES,
    SIZES,
    Description,
    Thing,
    place_of,
    signed_distance,
)

_BORDER: Final = 2
_CONTRAST: Final = 60.0
"""Distance from the background, in sRGB units, above which a pixel belongs to a thing."""
_MIN_AREA: Final = 150
_MIN_HOLE: Final = 40
_MIN_OVERLAP: Final = 0.7
"""Intersection over union with the best shape below which a part is not recognized."""
_MAX_COLOR_DISTANCE: Final = 90.0
_TEMPLATE_CELLS: Final = 96
_TEMPLATE_REACH: Final = 1.5
"""Half the width of a shape's template, in units of the square root of the shape's area."""

_OPPOSITES: Final = {"right of": "left of", "below": "above"}


@dataclass(frozen=True, slots=True)
class Patch:
    """A connected part: its pixels with holes filled, those without, and the area of the holes."""

    filled: np.ndarray
    solid: np.ndarray
    hole_area: int


def read_picture(pixels: np.ndarray) -> Description:
    """Describe a picture (uint8 [128, 128, 3]), with things from left to right or top to bottom."""
    image = pixels.astype(np.float32)
    background, template = _nearest_background(image)
    mask = np.sqrt(np.square(image - template).sum(-1)) > _CONTRAST
    found = [(_thing(image, part), *_center(part.filled)) for part in _parts(mask)]
    relation = None
    if len(found) == 2:
        (_, x0, y0), (_, x1, y1) = found
        across = abs(x1 - x0) > abs(y1 - y0)
        found.sort(key=lambda entry: entry[1] if across else entry[2])
        relation = "left of" if across else "above"
    return Description(tuple(entry[0] for entry in found), relation, background)


def compare(claim: Description, seen: Description) -> dict[str, bool]:
    """For each attribute that the claim mentions, whether it is right for all things.

    Things are matched so that as many of their attributes as possible are right. If the number of
    things differs from the claim, nothing about them or their relation is right.
    """
    verdict = {"count": len(claim.things) == len(seen.things)}
    if claim.background is not None:
        verdict["background"] = claim.background == seen.background
    names = [
        name
        for name in ("shape", "colour", "size", "place")
        if any(getattr(thing, name) is not None for thing in claim.things)
    ]
    if not verdict["count"]:
        verdict.update(dict.fromkeys(names, False))
        if claim.relation is not None:
            verdict["relation"] = False
        return verdict
    claimed, relation = _in_reading_order(claim)
    orders = permutations(seen.things)
    best = max(orders, key=lambda things: sum(_agreement(claimed, things, names).values()))
    verdict |= _agreement(claimed, best, names)
    if relation is not None:
        verdict["relation"] = relation == seen.relation and best == seen.things
    return verdict


def _in_reading_order(claim: Description) -> tuple[tuple[Thing, ...], str | None]:
    """Turn "A right of B" into the equivalent "B left of A"."""
    if claim.relation in _OPPOSITES:
        return claim.things[::-1], _OPPOSITES[claim.relation]
    return claim.things, claim.relation


def _agreement(
    claimed: tuple[Thing, ...], things: tuple[Thing, ...], names: list[str]
) -> dict[str, bool]:
    return {
        name: all(
            getattr(said, name) in (None, getattr(thing, name))
            for said, thing in zip(claimed, things, strict=True)
        )
        for name in names
    }


@cache
def _background_templates() -> dict[str, np.ndarray]:
    ramp = np.linspace(0, 1, PICTURE_SIZE, dtype=np.float32)[:, None, None]
    templates: dict[str, np.ndarray] = {}
    for name, (upper, lower) in BACKGROUNDS.items():
        top, bottom = np.array(upper, np.float32), np.array(lower, np.float32)
        rows = top + (bottom - top) * ramp
        templates[name] = np.broadcast_to(rows, (PICTURE_SIZE, PICTURE_SIZE, 3))
    return templates


def _nearest_background(image: np.ndarray) -> tuple[str, np.ndarray]:
    border = np.ones(image.shape[:2], dtype=bool)
    border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    templates = _background_templates()
    # The median is robust to a thing that touches the border.
    name = min(
        templates,
        key=lambda n: float(np.median(np.abs(image - templates[n]).sum(-1)[border])),
    )
    return name, templates[name]


def _parts(mask: np.ndarray) -> list[Patch]:
    """The connected parts of the mask that are large enough, with their holes separated."""
    labels, areas = _label(mask)
    parts: list[Patch] = []
    for label in np.flatnonzero(areas >= _MIN_AREA):
        solid = labels == label
        outside, _ = _label(~solid)
        edge = np.concatenate([outside[0], outside[-1], outside[:, 0], outside[:, -1]])
        hole = ~solid & ~np.isin(outside, edge[edge >= 0])
        parts.append(Patch(solid | hole, solid, int(hole.sum())))
    # A spot within a ring's hole is not a thing of its own.
    return [p for p in parts if not any(q is not p and (q.filled & p.solid).any() for q in parts)]


def _label(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label the 4-connected parts: [H, W] labels from 0 (-1 outside the mask), and their areas."""
    labels = np.full(mask.shape, -1)
    parents: list[int] = []

    def root(label: int) -> int:
        while parents[label] != label:
            label = parents[label]
        return label

    above: list[tuple[int, int, int]] = []
    runs: list[tuple[int, int, int, int]] = []
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), dtype=np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded, axis=1)
    for row in range(mask.shape[0]):
        starts = np.flatnonzero(change[row] == 1).tolist()
        ends = np.flatnonzero(change[row] == -1).tolist()
        here: list[tuple[int, int, int]] = []
        for start, end in zip(starts, ends, strict=True):
            touching = [root(label) for s, e, label in above if s < end and start < e]
            label = min(touching, default=len(parents))
            if not touching:
                parents.append(label)
            for other in touching:
                parents[other] = label
            here.append((start, end, label))
            runs.append((row, start, end, label))
        above = here
    roots = [root(label) for label in range(len(parents))]
    numbers = {label: number for number, label in enumerate(sorted(set(roots)))}
    areas = np.zeros(len(numbers), dtype=np.int64)
    for row, start, end, label in runs:
        number = numbers[roots[label]]
        labels[row, start:end] = number
        areas[number] += end - start
    return labels, areas


def _center(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def _thing(image: np.ndarray, part: Patch) -> Thing:
    shape = _shape(part)
    area = int(part.filled.sum())
    radius = (area / _unit_area(shape or "circle")) ** 0.5
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
    return Thing(shape, _colour(image, part.solid), size, place_of(*_center(part.filled)))


def _colour(image: np.ndarray, solid: np.ndarray) -> str | None:
    inside = solid
    for _ in range(2):
        inside = _eroded(inside)
    chosen = image[inside if inside.any() else solid]
    median = np.median(chosen, axis=0)
    distances = {name: float(np.linalg.norm(median - rgb)) for name, rgb in COLORS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] < _MAX_COLOR_DISTANCE else None


def _eroded(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _shape(part: Patch) -> str | None:
    if part.hole_area >= _MIN_HOLE:
        return "ring"
    rows, columns = np.nonzero(part.filled)
    scale = _TEMPLATE_CELLS / (2 * _TEMPLATE_REACH * len(rows) ** 0.5)
    half = _TEMPLATE_CELLS / 2
    row = ((rows - rows.mean()) * scale + half).astype(np.int64).clip(0, _TEMPLATE_CELLS - 1)
    column = ((columns - columns.mean()) * scale + half).astype(np.int64)
    column = column.clip(0, _TEMPLATE_CELLS - 1)
    overlaps: dict[str, float] = {}
    for shape, template in _shape_templates().items():
        common = float(template[row, column].mean())
        # Both have the same area, so the union is twice the area minus the intersection.
        overlaps[shape] = common / (2 - common)
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= _MIN_OVERLAP else None


@cache
def _drawn(shape: str, cells: int, reach: float) -> np.ndarray:
    """The filled shape of radius 1 on a grid of cells, as bool [cells, cells]."""
    line = (torch.arange(cells) + 0.5) * (2 * reach / cells) - reach
    outline = "circle" if shape == "ring" else shape
    distance = signed_distance(outline, line[None], line[:, None], torch.tensor(1.0))
    return (distance < 0).numpy()


@cache
def _unit_area(shape: str) -> float:
    """Area of the filled shape of radius 1."""
    return float(_drawn(shape, 512, 1.25).mean()) * 2.5**2


@cache
def _shape_templates() -> dict[str, np.ndarray]:
    """Each shape without a hole, with area 1, around its center of mass: bool [cells, cells]."""
    fine = 512
    templates: dict[str, np.ndarray] = {}
    for shape in SHAPES:
        if shape == "ring":
            continue
        drawn = _drawn(shape, fine, 1.25)
        rows, columns = np.nonzero(drawn)
        cell = 2.5 / fine
        line = (np.arange(_TEMPLATE_CELLS) + 0.5) / _TEMPLATE_CELLS * 2 - 1
        offset = line * _TEMPLATE_REACH * _unit_area(shape) ** 0.5 / cell
        row = np.rint(offset + rows.mean()).astype(np.int64)
        column = np.rint(offset + columns.mean()).astype(np.int64)
        inside = ((row >= 0) & (row < fine))[:, None] & ((column >= 0) & (column < fine))
        templates[shape] = drawn[np.ix_(row.clip(0, fine - 1), column.clip(0, fine - 1))] & inside
    return templates

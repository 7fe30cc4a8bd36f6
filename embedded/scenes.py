"""Captioned pictures of simple shapes, drawn from signed distances on any device.

A `Scene` is a pure function of its seed: a description of the picture, a caption with the part of
the description that it mentions, and the geometry. `render` draws a batch of scenes with one pixel
of anti-aliasing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

PICTURE_SIZE: Final = 128
"""Height and width of a picture, in pixels."""

SHAPES: Final = ("circle", "square", "triangle", "star", "ring")

COLORS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 30, 35),
    "green": (30, 155, 50),
    "blue": (35, 60, 220),
    "yellow": (250, 225, 35),
    "orange": (250, 135, 15),
    "purple": (125, 40, 165),
    "pink": (255, 130, 190),
    "cyan": (20, 210, 220),
}
"""sRGB, 0 to 255."""

SIZES: Final[dict[str, float]] = {"small": 17.0, "large": 28.0}
"""Half of an object's width, in pixels."""

PLACES: Final[dict[str, tuple[float, float]]] = {
    "left": (36.0, 64.0),
    "right": (92.0, 64.0),
    "top": (64.0, 36.0),
    "bottom": (64.0, 92.0),
    "center": (64.0, 64.0),
}
"""Center of a single object, x to the right and y down, in pixels."""

BACKGROUNDS: Final[dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]]] = {
    "white": ((255, 255, 255), (255, 255, 255)),
    "black": ((0, 0, 0), (0, 0, 0)),
    "gray": ((128, 128, 128), (128, 128, 128)),
    "sunset": ((70, 40, 95), (225, 155, 110)),
    "sky": ((85, 135, 195), (215, 230, 245)),
}
"""sRGB at the upper and the lower edge, with linear interpolation between them."""

RELATIONS: Final[dict[str, tuple[tuple[float, float], tuple[float, float]]]] = {
    "left of": ((32.5, 64.0), (95.5, 64.0)),
    "right of": ((95.5, 64.0), (32.5, 64.0)),
    "above": ((64.0, 32.5), (64.0, 95.5)),
    "below": ((64.0, 95.5), (64.0, 32.5)),
}
"""Centers of the first and the second of two objects, in pixels."""

SQUARE_HALF_SIDE: Final = 0.88
TRIANGLE_RADIUS: Final = 1.155
STAR_RADIUS: Final = 1.05
STAR_INNER: Final = 0.5
RING_HOLE: Final = 0.55

_PHRASES: Final[dict[str, tuple[str, ...]]] = {
    "small": ("small", "small", "small", "little"),
    "large": ("large", "large", "large", "big"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "center": ("in the center", "in the center", "in the middle"),
    "white": ("on a white background", "on a white background", "on white"),
    "black": ("on a black background", "on a black background", "on black"),
    "gray": ("on a gray background", "on a gray background", "on gray", "on a grey background"),
    "sunset": ("at sunset", "at sunset", "in front of a sunset"),
    "sky": ("in the sky", "in the sky", "in front of a sky"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
}
_OPENINGS: Final = ("",) * 17 + ("a picture of ", "an image of ", "a photo of ")

VOCABULARY: Final = tuple(
    sorted(
        {*SHAPES, *COLORS, "a", "an", "and", "with", "one", "two", "is", "there", "disk"}
        | {word for phrases in _PHRASES.values() for phrase in phrases for word in phrase.split()}
        | {word for opening in _OPENINGS for word in opening.split()}
        | {",", "."}
    )
)
"""All words and punctuation marks that the embedded model's tokenizer knows."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. `None` means not mentioned (in a caption's claim) or not recognized (if read)."""

    shape: str | None
    colour: str | None
    size: str | None
    place: str | None


@dataclass(frozen=True, slots=True)
class Description:
    """What a picture shows, or what a caption claims that it shows.

    `relation` is the position of the first thing relative to the second; `None` if there is only
    one thing or if it is not mentioned.
    """

    things: tuple[Thing, ...]
    relation: str | None
    background: str | None


@dataclass(frozen=True, slots=True)
class Outline:
    """Position of one object: center and half width, in pixels."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture: the complete description, the caption, the caption's claim and the geometry."""

    seed: int
    truth: Description
    caption: str
    claim: Description
    outlines: tuple[Outline, ...]


def place_of(x: float, y: float) -> str:
    """The place whose center is nearest to (x, y), in pixels."""
    return min(PLACES, key=lambda place: (PLACES[place][0] - x) ** 2 + (PLACES[place][1] - y) ** 2)


def make_scene(seed: int, *, things: int | None = None) -> Scene:
    """The scene with this seed, of one or two things (chosen with equal probability if None)."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 3)) if things is None else things
    background = _choose(rng, BACKGROUNDS)
    if count == 1:
        place = _choose(rng, PLACES)
        outlines = [_outline(rng, PLACES[place], (3.0, 3.0))]
        relation = None
    else:
        relation = _choose(rng, RELATIONS)
        across = relation in ("left of", "right of")
        # Along the axis of the relation, two large objects are at least 7 pixels apart.
        jitter = (1.0, 8.0) if across else (8.0, 1.0)
        outlines = [_outline(rng, centre, jitter) for centre in RELATIONS[relation]]
    shown: list[Thing] = []
    for index, outline in enumerate(outlines):
        size = _choose(rng, SIZES)
        outlines[index] = replace(outline, radius=SIZES[size] * outline.radius)
        shown.append(
            Thing(_choose(rng, SHAPES), _choose(rng, COLORS), size, place_of(outline.x, outline.y))
        )
    truth = Description(tuple(shown), relation, background)
    claim = _claim(rng, truth)
    return Scene(seed, truth, _caption(rng, claim), claim, tuple(outlines))


def recaption(scene: Scene, variant: int) -> tuple[str, Description]:
    """One of the captions of a picture and its claim; variant 0 is the scene's own caption."""
    if variant == 0:
        return scene.caption, scene.claim
    rng = np.random.default_rng([scene.seed, variant])
    claim = _claim(rng, scene.truth)
    return _caption(rng, claim), claim


def _choose(rng: np.random.Generator, options: Iterable[str]) -> str:
    listed = tuple(options)
    return listed[int(rng.integers(len(listed)))]


def _outline(
    rng: np.random.Generator, centre: tuple[float, float], jitter: tuple[float, float]
) -> Outline:
    """An outline whose radius is still a factor on the size."""
    return Outline(
        x=centre[0] + float(rng.uniform(-jitter[0], jitter[0])),
        y=centre[1] + float(rng.uniform(-jitter[1], jitter[1])),
        radius=float(rng.uniform(0.97, 1.03)),
    )


def _claim(rng: np.random.Generator, truth: Description) -> Description:
    """Leave out some of the attributes, as people do in captions."""
    alone = len(truth.things) == 1
    return Description(
        things=tuple(
            Thing(
                thing.shape,
                thing.colour,
                thing.size if rng.random() < (0.8 if alone else 0.5) else None,
                thing.place if alone and rng.random() < 0.7 else None,
            )
            for thing in truth.things
        ),
        relation=truth.relation,
        background=truth.background if rng.random() < 0.85 else None,
    )


def _caption(rng: np.random.Generator, claim: Description) -> str:
    def phrase(key: str) -> str:
        return _choose(rng, _PHRASES[key])

    def noun(thing: Thing) -> str:
        words = [
            *([phrase(thing.size)] if thing.size else []),
            thing.colour or "",
            thing.shape or "",
        ]
        article = "an" if words[0] == "orange" else "a"
        return " ".join([article, *words])

    parts = [noun(claim.things[0])]
    if claim.things[0].place:
        parts.append(phrase(claim.things[0].place))
    if claim.relation:
        parts += [phrase(claim.relation), noun(claim.things[1])]
    body = " ".join(parts)
    if claim.background and rng.random() < 0.1:
        return f"{phrase(claim.background)}, {body}"
    ending = f" {phrase(claim.background)}" if claim.background else ""
    return f"{_choose(rng, _OPENINGS)}{body}{ending}"


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance to the outline, negative inside, in the units of x and y (which broadcast).

    Squares use the exact inner distance and an outer bound, the star its five-fold symmetry
    (after Inigo Quilez, "2D distance functions").
    """
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "ring":
        middle, half = radius * (1 + RING_HOLE) / 2, radius * (1 - RING_HOLE) / 2
        return (torch.hypot(x, y) - middle).abs() - half
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - SQUARE_HALF_SIDE * radius
    if shape == "triangle":
        edge = TRIANGLE_RADIUS * radius / 2
        return torch.maximum(y - edge, x.abs() * (3**0.5 / 2) - y / 2 - edge)
    if shape == "star":
        return _star_distance(x, y, STAR_RADIUS * radius)
    raise ValueError(f"shape is {shape!r}; allowed are {', '.join(SHAPES)}")


def _star_distance(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    # Fold into the half wedge beside one point of the star, then measure to its one edge.
    angle = torch.atan2(x, -y)
    sector = 2 * torch.pi / 5
    folded = (angle - sector * torch.round(angle / sector)).abs()
    length = torch.hypot(x, y)
    along, across = length * torch.cos(folded), length * torch.sin(folded)
    half = np.pi / 5
    inner_along, inner_across = STAR_INNER * np.cos(half), STAR_INNER * np.sin(half)
    edge = np.array([inner_along - 1.0, inner_across])
    edge /= np.linalg.norm(edge)
    return (along - radius) * float(edge[1]) - across * float(edge[0])


def render(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Draw the scenes: [scenes, 3, 128, 128] float32 in [-1, 1], sRGB."""
    ramp = torch.linspace(0, 1, PICTURE_SIZE, device=device)
    ends = torch.tensor([BACKGROUNDS[s.truth.background or "white"] for s in scenes], device=device)
    upper, lower = ends[:, 0, :, None], ends[:, 1, :, None]
    rows = upper + (lower - upper) * ramp
    canvas = (rows / 127.5 - 1)[..., None].repeat(1, 1, 1, PICTURE_SIZE)
    for index in range(max((len(s.outlines) for s in scenes), default=0)):
        for shape in SHAPES:
            chosen = [
                number
                for number, scene in enumerate(scenes)
                if index < len(scene.outlines) and scene.truth.things[index].shape == shape
            ]
            if chosen:
                _paint(canvas, scenes, chosen, index)
    return canvas


def _paint(canvas: Tensor, scenes: Sequence[Scene], chosen: list[int], index: int) -> None:
    """Draw in place the thing number `index`, of one shape, of each chosen scene."""
    device = canvas.device
    centre = torch.arange(PICTURE_SIZE, device=device) + 0.5
    places = [scenes[number].outlines[index] for number in chosen]
    things = [scenes[number].truth.things[index] for number in chosen]
    x, y, radius = torch.tensor(
        [[o.x, o.y, o.radius] for o in places], dtype=torch.float32, device=device
    ).T[..., None, None]
    distance = signed_distance(things[0].shape or "", centre - x, centre[:, None] - y, radius)
    cover = (0.5 - distance).clamp(0, 1)[:, None]
    paint = torch.tensor([COLORS[t.colour or ""] for t in things], device=device)
    paint = (paint / 127.5 - 1)[..., None, None]
    canvas[chosen] += cover * (paint - canvas[chosen])


def to_pixels(pictures: Tensor) -> np.ndarray:
    """Pictures in [-1, 1], [rows, 3, H, W], as uint8 [rows, H, W, 3]."""
    scaled = (pictures.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

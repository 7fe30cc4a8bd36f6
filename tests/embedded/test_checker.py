"""The checker reads pictures correctly, which is a precondition for judging a model."""

from dataclasses import replace

import numpy as np
import pytest

from embedded.checker import compare, read_picture
from embedded.scenes import Description, Scene, Thing, make_scene, render, to_pixels
from tests.covering import EVERY_CELL

FRESH = 5_000_000_000
READ = 2000 if EVERY_CELL else 200

RED_STAR = Thing("star", "red", "small", "left")
BLUE_RING = Thing("ring", "blue", "large", "right")
PAIR = Description((RED_STAR, BLUE_RING), "left of", "black")


def test_the_checker_reads_at_least_99_percent_of_fresh_pictures() -> None:
    right = 0
    for start in range(0, READ, 50):
        scenes = [make_scene(FRESH + start + number) for number in range(50)]
        for scene, picture in zip(scenes, to_pixels(render(scenes)), strict=True):
            right += all(compare(scene.truth, read_picture(picture)).values())
    assert right / READ >= 0.99


def test_the_checker_forgives_noise_and_slight_tints() -> None:
    rng = np.random.default_rng(0)
    scenes = [make_scene(FRESH + number) for number in range(100)]
    pictures = to_pixels(render(scenes)).astype(float)
    pictures += rng.normal(0, 6, pictures.shape) + rng.normal(0, 6, (100, 1, 1, 3))
    noisy = pictures.round().clip(0, 255).astype(np.uint8)
    verdicts = [
        compare(scene.truth, read_picture(picture))
        for scene, picture in zip(scenes, noisy, strict=True)
    ]
    assert sum(all(verdict.values()) for verdict in verdicts) >= 97


def test_an_empty_picture_shows_nothing() -> None:
    seen = read_picture(np.full((128, 128, 3), 255, dtype=np.uint8))
    assert seen == Description((), None, "white")


def test_a_smear_has_no_shape_and_a_strange_colour_no_name() -> None:
    picture = np.zeros((128, 128, 3), dtype=np.uint8)
    picture[60:66, 10:110] = (140, 90, 90)
    (thing,) = read_picture(picture).things
    assert thing.shape is None
    picture = np.zeros((128, 128, 3), dtype=np.uint8)
    picture[40:80, 40:80] = (255, 255, 255)
    (thing,) = read_picture(picture).things
    assert thing.shape == "square"
    assert thing.colour is None


def test_a_claim_agrees_with_itself() -> None:
    assert compare(PAIR, PAIR) == dict.fromkeys(
        ("count", "background", "shape", "colour", "size", "place", "relation"), True
    )


def test_the_order_of_words_does_not_matter() -> None:
    turned = Description((BLUE_RING, RED_STAR), "right of", "black")
    assert all(compare(turned, PAIR).values())


def test_what_is_not_said_is_not_judged() -> None:
    silent = Description((Thing("star", "red", None, None),), None, None)
    seen = Description((replace(RED_STAR, size="large", place="top"),), None, "sky")
    assert compare(silent, seen) == {"count": True, "shape": True, "colour": True}


@pytest.mark.parametrize(
    ("seen", "wrong"),
    [
        (replace(PAIR, background="white"), {"background"}),
        (replace(PAIR, relation="above"), {"relation"}),
        (replace(PAIR, things=(BLUE_RING, RED_STAR)), {"relation"}),
        (replace(PAIR, things=(replace(RED_STAR, shape=None), BLUE_RING)), {"shape"}),
        (replace(PAIR, things=(replace(RED_STAR, colour="pink"), BLUE_RING)), {"colour"}),
        (
            replace(PAIR, things=(RED_STAR,), relation=None),
            {"count", "shape", "colour", "size", "place", "relation"},
        ),
    ],
)
def test_each_wrong_attribute_is_named(seen: Description, wrong: set[str]) -> None:
    assert {name for name, right in compare(PAIR, seen).items() if not right} == wrong


def test_swapped_colours_are_wrong_colours() -> None:
    swapped = replace(
        PAIR, things=(replace(RED_STAR, colour="blue"), replace(BLUE_RING, colour="red"))
    )
    assert not compare(PAIR, swapped)["colour"]


def scene_with(shape: str) -> Scene:
    return next(
        scene
        for scene in (make_scene(FRESH + n, things=1) for n in range(500))
        if scene.truth.things[0].shape == shape
    )


def test_a_ring_is_told_from_a_circle_by_its_hole() -> None:
    for shape in ("ring", "circle"):
        scene = scene_with(shape)
        assert read_picture(to_pixels(render([scene]))[0]).things[0].shape == shape

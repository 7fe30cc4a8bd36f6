"""The pictures and their captions."""

from collections import Counter

import numpy as np
import pytest
import torch

from embedded.scenes import (
    BACKGROUNDS,
    COLORS,
    PICTURE_SIZE,
    RELATIONS,
    SHAPES,
    SIZES,
    VOCABULARY,
    make_scene,
    recaption,
    render,
    signed_distance,
    to_pixels,
)

SYNONYMS = {"small": "little", "large": "big", "above": "over", "below": "under", "gray": "grey"}


def test_a_seed_always_gives_the_same_scene_and_picture() -> None:
    first, second = make_scene(7), make_scene(7)
    assert first == second
    assert torch.equal(render([first]), render([second]))
    assert make_scene(8) != first


def test_a_picture_does_not_depend_on_its_company() -> None:
    scenes = [make_scene(seed) for seed in range(12)]
    together = render(scenes)
    for scene, picture in zip(scenes, together, strict=True):
        assert torch.equal(render([scene])[0], picture)


def test_pictures_are_in_range_and_anti_aliased() -> None:
    pictures = render([make_scene(seed) for seed in range(20)])
    assert pictures.shape == (20, 3, PICTURE_SIZE, PICTURE_SIZE)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    circle = next(
        scene
        for scene in map(make_scene, range(1000))
        if scene.truth.background == "black"
        and len(scene.truth.things) == 1
        and scene.truth.things[0].shape == "circle"
    )
    pixels = to_pixels(render([circle]))[0].astype(int)
    full = COLORS[circle.truth.things[0].colour or ""]
    brightness = pixels.sum(-1)
    between = (brightness > 0) & (brightness < sum(full))
    assert 20 < between.sum() < 300


def test_every_kind_of_thing_occurs() -> None:
    scenes = [make_scene(seed) for seed in range(1500)]
    things = [thing for scene in scenes for thing in scene.truth.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLORS)
    assert {thing.size for thing in things} == set(SIZES)
    assert {scene.truth.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.truth.relation for scene in scenes} == {*RELATIONS, None}
    counts = Counter(len(scene.truth.things) for scene in scenes)
    assert min(counts[1], counts[2]) > 600


def test_the_number_of_things_can_be_chosen() -> None:
    assert all(len(make_scene(seed, things=2).truth.things) == 2 for seed in range(30))
    assert all(len(make_scene(seed, things=1).truth.things) == 1 for seed in range(30))


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_a_caption_says_exactly_what_it_claims(variant: int) -> None:
    for seed in range(300):
        scene = make_scene(seed)
        caption, claim = recaption(scene, variant)
        words = caption.replace(",", "").split()
        for thing, truth in zip(claim.things, scene.truth.things, strict=True):
            assert thing.shape == truth.shape
            assert thing.colour == truth.colour
            assert thing.shape in words
            assert thing.colour in words
            assert thing.size in (None, truth.size)
            assert thing.place in (None, truth.place)
        sizes = [word for word in words if word in ("small", "little", "large", "big")]
        said = [thing.size for thing in claim.things if thing.size]
        assert [{"little": "small", "big": "large"}.get(word, word) for word in sizes] == said
        background = claim.background
        assert background in (None, scene.truth.background)
        mentioned = [n for n in BACKGROUNDS if {n, SYNONYMS.get(n)} & set(words)]
        assert mentioned == ([background] if background else [])
        relation = claim.relation
        assert relation == scene.truth.relation
        if relation:
            key = relation.split()[0]
            assert {key, SYNONYMS.get(key)} & set(words)


def test_captions_use_known_words_only() -> None:
    for seed in range(500):
        caption = make_scene(seed).caption.replace(",", " ,")
        assert set(caption.split()) <= set(VOCABULARY)


def test_two_things_never_touch() -> None:
    scenes = [make_scene(seed, things=2) for seed in range(400)]
    for scene in scenes:
        first, second = scene.outlines
        apart = max(abs(first.x - second.x), abs(first.y - second.y))
        assert apart > first.radius + second.radius + 2


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_changes_by_one_each_pixel_at_the_outline(shape: str) -> None:
    line = torch.arange(-40.0, 40.0) + 0.5
    distance = signed_distance(shape, line[None], line[:, None], torch.tensor(28.0))
    slope_y, slope_x = torch.gradient(distance)
    slope = torch.hypot(slope_x, slope_y)[distance.abs() < 0.5]
    assert float(slope.median()) == pytest.approx(1, abs=0.02)


def test_an_unknown_shape_is_refused_by_name() -> None:
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match=r"'heart'.*circle, square"):
        signed_distance("heart", zero, zero, zero)


def test_pixels_round_to_the_nearest_value() -> None:
    picture = torch.tensor([-1.5, -1, 0, 1, 2]).expand(1, 3, 1, 5)
    assert to_pixels(picture)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_pixels(picture).dtype == np.uint8

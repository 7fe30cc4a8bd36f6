"""What is drawn: unseen captions with seeds, negative prompts and pictures.

A sitter is one picture to draw, and a sitting a set of them. ``captions`` alternate between one
object and two, each with its index as the seed. ``again`` draws the first of them with other seeds.
``two`` are those of two things. ``overlapping`` adds a negative prompt that names the first thing
of the caption. ``avoiding`` does not mention the background and has a white one as its negative
prompt. ``aimed`` does not mention it either, and must show the true one. ``pictures`` start from
the picture of another caption.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from embedded.report import unseen_scenes
from embedded.scenes import Description, Thing, render
from embedded.unet_training import training_captions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from embedded.scenes import Scene
    from studies.guidance.cells import Sitting

WHITE = "on a white background"
OTHER_SEEDS = 1_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Sitter:
    """One picture to draw.

    Attributes:
        scene: scene that the caption was made from.
        prompt: the caption.
        claim: what the picture must show.
        seed: seed of the noise.
        negative: negative prompt.
        image: picture to start from, ``[3, H, W]``; None for none.
    """

    scene: Scene
    prompt: str
    claim: Description
    seed: int
    negative: str = ""
    image: Tensor | None = None

    @property
    def words(self) -> dict[str, str]:
        """Words that settings may refer to.

        ``first`` and ``second`` describe the things in words; ``shape`` and ``colour`` are those of
        the first thing, and ``background`` is the background. What the caption does not mention is
        left out.
        """
        names = ("first", "second")
        thing, background = self.claim.things[0], self.claim.background
        said = {"shape": thing.shape, "colour": thing.colour, "background": background}
        return {
            **dict(zip(names, map(_words, self.claim.things), strict=False)),
            **{name: word for name, word in said.items() if word is not None},
        }


class Sitters:
    """All sitters.

    Args:
        captions: number of captions in a block.
        again: number of them that are also drawn with other seeds.
        known_pictures: number of training pictures whose captions count as seen.
    """

    def __init__(self, captions: int, again: int, known_pictures: int) -> None:
        self.captions = captions
        self._again = again
        self._known_pictures = known_pictures
        self._blocks: dict[int, list[Sitter]] = {}

    def of(self, sitting: Sitting, block: int) -> list[Sitter]:
        """The sitters of one block, in order."""
        plain = self._block(block)
        if sitting == "again":
            return [replace(one, seed=one.seed + OTHER_SEEDS) for one in plain[: self._again]]
        if sitting == "two":
            return plain[1::2]
        if sitting == "overlapping":
            return [replace(one, negative=one.words["first"]) for one in plain]
        if sitting == "avoiding":
            return [_of_no_background(one) for one in plain]
        if sitting == "aimed":
            return [_of_true_background(one) for one in plain]
        if sitting == "pictures":
            others = render([one.scene for one in [*plain[1:], plain[0]]])
            return [replace(one, image=image) for one, image in zip(plain, others, strict=True)]
        return plain

    def _block(self, block: int) -> list[Sitter]:
        if block not in self._blocks:
            first, half = block * self.captions, self.captions // 2
            kinds = [self._scenes(things, first // 2 + half)[first // 2 :] for things in (1, 2)]
            self._blocks[block] = [
                Sitter(scene, scene.caption, scene.claim, seed)
                for seed, scene in enumerate(_in_turn(*kinds), first)
            ]
        return self._blocks[block]

    def _scenes(self, things: int, count: int) -> list[Scene]:
        return unseen_scenes(things, count, self._known)

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(
            text for texts in training_captions(self._known_pictures) for text in texts
        )


def _in_turn(one: Sequence[Scene], two: Sequence[Scene]) -> list[Scene]:
    return [scene for pair in zip(one, two, strict=True) for scene in pair]


def _of_no_background(sitter: Sitter) -> Sitter:
    thing = replace(sitter.claim.things[0], place=None)
    claim = Description((thing,), None, None)
    return replace(sitter, prompt=_words(thing), claim=claim, negative=WHITE)


def _of_true_background(sitter: Sitter) -> Sitter:
    unsaid = _of_no_background(sitter)
    claim = replace(unsaid.claim, background=sitter.scene.truth.background)
    return replace(unsaid, claim=claim, negative="")


def _words(thing: Thing) -> str:
    words = [word for word in (thing.size, thing.colour, thing.shape) if word]
    return " ".join(["an" if words[0] == "orange" else "a", *words])

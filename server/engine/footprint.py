"""Estimate of what the images of a request need at once: evaluations and bytes."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from server.engine.guidance_plan import plan_guidance

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from torch import Tensor

    from server.engine.guidance_plan import GuidancePlan
    from server.engine.task import ImageTask

__all__ = ["Footprint", "Kind", "footprint", "heaviest"]

Kind: TypeAlias = "tuple[str, tuple[int, int, int]]"
"""Model, and shape ``(C, h, w)`` of latents with as many cells as a forward pass reads for a
row."""

NUMBER_BYTES = 4
"""States and pictures are float32."""


class Footprint(NamedTuple):
    """Needs of some images.

    Attributes:
        rows: evaluations, by model and shape; ControlNets count by their cost.
        nbytes: bytes of their states, of the pictures that they start from, refer to or are
            controlled by, of the network's conditioning and image prompts, and of the finished
            pictures.
    """

    rows: dict[Kind, float]
    nbytes: int


def footprint(
    tasks: Sequence[ImageTask],
    kind_of: Callable[[ImageTask], Kind],
    text_bytes: Callable[[str, int], int],
) -> Footprint:
    """Estimate what the images of a request need.

    Args:
        tasks: the images; only the sizes of their pictures matter.
        kind_of: function that returns the model and shape of a task.
        text_bytes: function that returns the bytes of one encoded text, given the model and the
            number of reference images, whose own bytes are excluded.
    """
    rows = dict[Kind, float]()
    states = 0
    pictures: dict[int, Tensor] = {}
    beside: dict[int, int] = {}
    texts = set[tuple[str, int, object]]()
    planned: dict[Hashable, GuidancePlan] = {}
    for task in tasks:
        # Images of a request share the objects that their guidance is planned from.
        kinds = task.plan, task.rule, task.policy, task.terms, task.cache, task.controls
        key = tuple(map(id, kinds)), task.prompt, task.negative_prompt
        guidance = planned.get(key) or planned.setdefault(key, plan_guidance(task))
        kind = kind_of(task)
        rows[kind] = rows.get(kind, 0.0) + guidance.left[0]
        slots = task.plan.slots + 2 + task.rule.memory_slots
        slots += guidance.policy_slots + guidance.cache_slots
        states += NUMBER_BYTES * slots * prod(kind[1]) + 3 * task.width * task.height
        texts |= {(task.model, len(task.references), text) for text in guidance.texts}
        steering = (use.picture for use in task.controls)
        started = (task.image, task.kept, task.latents, task.mask)
        beside_prompt = (*steering, *task.references)
        for picture in (*started, *(term.picture for term in task.terms), *beside_prompt):
            if picture is not None:
                pictures[id(picture)] = picture
        for use in task.image_prompts:
            beside[id(use)] = use.nbytes
    encoded_bytes = sum(text_bytes(model, count) for model, count, _ in texts)
    states += sum(beside.values())
    return Footprint(rows, states + encoded_bytes + sum(one.nbytes for one in pictures.values()))


def heaviest(task: ImageTask) -> float:
    """Maximum cost of a stage of an image in rows of the denoiser, with all ControlNets active."""
    return plan_guidance(task).widest * (1 + sum(use.control.cost for use in task.controls))

"""Prompt editing: the texts that prompts of a request change to while its images are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.errors import InvalidRequest
from server.models.prompt_editing import MAX_TEXTS, Timeline, texts_along

if TYPE_CHECKING:
    from collections.abc import Iterator

    from server.requests.schema import ResolvedRequest

__all__ = ["check_editing", "prompts_of", "timelines_of", "versions_of"]


def timelines_of(resolved: ResolvedRequest) -> tuple[Timeline, ...]:
    """Return how times in prompts are counted in each run of a request, as in AUTOMATIC1111.

    A time with a point is a share of the run. If the run starts from an image, it is a share of all
    steps, whatever the strength; in the second run of `hires` it is one of the steps that are made.
    """
    sampler, hires = resolved.sampler, resolved.hires
    first = sampler.evaluations_of_full_steps(resolved.steps)
    if hires is None:
        return (Timeline(first),)
    made = max(1, int((hires.steps or resolved.steps) * hires.strength))
    return Timeline(first), Timeline(sampler.evaluations_of_full_steps(made), before=first)


def prompts_of(resolved: ResolvedRequest) -> Iterator[tuple[str, str]]:
    """Yield the prompts that `prompt_syntax` applies to, each with its field."""
    yield "prompt", resolved.prompt
    yield "negative_prompt", resolved.negative_prompt or ""
    for branch in resolved.guidance.branches:
        if branch.told == "own":
            yield "guidance", branch.prompt


def versions_of(resolved: ResolvedRequest, prompt: str) -> Iterator[str]:
    """Yield the texts of a prompt over the runs of a request; texts may be repeated."""
    if resolved.prompt_syntax is None:
        yield prompt
        return
    for timeline in timelines_of(resolved):
        yield from texts_along(prompt, timeline)


def check_editing(resolved: ResolvedRequest) -> None:
    """Refuse prompts that change to too many texts, all of which would have to be encoded.

    Raises:
        InvalidRequest: there are more than ``MAX_TEXTS`` texts in total.
    """
    texts = dict[tuple[str, str], None]()
    for field, prompt in prompts_of(resolved):
        for text in versions_of(resolved, prompt):
            texts[field, text] = None
            if len(texts) > MAX_TEXTS:
                raise InvalidRequest(
                    field,
                    f"{field} changes too often while an image is drawn: all prompts of a request "
                    f"together may change to at most {MAX_TEXTS} different texts.",
                )

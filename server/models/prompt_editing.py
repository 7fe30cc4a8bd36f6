"""Prompts that change during a run, in the syntax of AUTOMATIC1111.

``[from:to:when]`` replaces a text, ``[to:when]`` adds one, ``[from::when]`` removes one and
``[a|b|c]`` alternates; all of them nest. The behavior is that of its
``prompt_parser.get_learned_conditioning_prompt_schedules`` and ``reconstruct_cond_batch``
(stable-diffusion-webui 1.10). Departure: a run that is longer than its timeline ends with the last
text, where AUTOMATIC1111 starts again with the first one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Final, TypeAlias

from server.models.emphasis import EmphasizedPrompt

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from server.models.blend import TextPrompt

__all__ = [
    "MAX_TEXTS",
    "EditedPrompt",
    "Timeline",
    "at_stage",
    "texts_along",
    "texts_of_run",
    "written_in",
]

MAX_TEXTS: Final = 64
"""Maximum number of texts that all prompts of a request may change to: each is encoded, and kept by
each image."""

READ_LATELY: Final = 32
"""Number of prompts whose parsed texts are cached, as a request needs them about ten times."""

_PIECE: Final = re.compile(r"\\.|[][():|]|[^][():|\\]+|\\")
_NUMBER: Final = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_OPENING: Final = {"]": "[", ")": "("}


@dataclass(frozen=True, slots=True)
class Timeline:
    """How times in the prompts of a run are interpreted: in evaluations, not in sampler steps.

    Attributes:
        evaluations: number of evaluations of the run; times with a point are fractions of it.
        before: number of evaluations of the run that made the image from which this one starts.
            Times without a point count them as well, and fractions of this run are written plus 1.
            None for a first run.
    """

    evaluations: int
    before: int | None = None

    def last(self, when: str) -> int:
        """The last evaluation, counted from 1, before the change at a time; 0 for none.

        Args:
            when: the time as written in the prompt.
        """
        number = float(when)
        if "." in when:
            number = (number - (self.before is not None)) * self.evaluations
        else:
            number -= self.before or 0
        return int(max(0, min(self.evaluations, number)))


@dataclass(frozen=True, slots=True)
class _Change:
    before: list[_Part]
    after: list[_Part]
    last: int

    def at(self, step: int) -> list[_Part]:
        return self.before if step <= self.last else self.after


@dataclass(frozen=True, slots=True)
class _Turns:
    texts: list[list[_Part]]

    def at(self, step: int) -> list[_Part]:
        return self.texts[(step - 1) % len(self.texts)]


_Part: TypeAlias = "str | _Change | _Turns"


@dataclass(slots=True)
class _Group:
    """The content of an open bracket so far, split at the marks ``:`` and ``|``."""

    opening: str
    fields: list[list[_Part]] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list[str])

    def closed(self, closing: str, timeline: Timeline) -> list[_Part] | None:
        """The parsed parts once the bracket is closed; None if ``closing`` cannot close it."""
        if self.opening != _OPENING[closing]:
            return None
        if not self.marks or (closing == ")" and self.marks == [":"]):
            return _joined([*self.as_written(), closing])
        if closing == ")":
            return None
        if set(self.marks) == {"|"}:
            return [_Turns(self.fields)]
        when = _number(self.fields[-1])
        if when is None or self.marks not in ([":"], [":", ":"]):
            return None
        before = self.fields[0] if len(self.marks) == 2 else []
        return [_Change(before, self.fields[-2], timeline.last(when))]

    def as_written(self) -> list[_Part]:
        """Its parts, with the bracket and the marks as plain text."""
        parts: list[_Part] = [self.opening, *self.fields[0]]
        for mark, own in zip(self.marks, self.fields[1:], strict=True):
            parts += [mark, *own]
        return parts


class EditedPrompt(EmphasizedPrompt):
    """A prompt that changes during a run; models only read the texts that it changes to.

    Attributes:
        texts: the different texts of all evaluations.
        order: index of the text of each evaluation.
    """

    texts: tuple[EmphasizedPrompt, ...]
    order: tuple[int, ...]

    def __new__(cls, written: str, stages: Sequence[str]) -> EditedPrompt:
        """Create the prompt.

        Args:
            written: prompt as written in the request.
            stages: its text at each evaluation; at least one.
        """
        made = super().__new__(cls, written)
        numbers = {text: number for number, text in enumerate(dict.fromkeys(stages))}
        made.texts = tuple(map(EmphasizedPrompt, numbers))
        made.order = tuple(numbers[text] for text in stages)
        return made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EditedPrompt) or not str.__eq__(self, other):
            return False
        return (self.texts, self.order) == (other.texts, other.order)

    def __hash__(self) -> int:
        return hash((EditedPrompt, str(self)))

    def number(self, stage: int) -> int:
        """Index of the text at a stage of the run."""
        return self.order[min(stage, len(self.order) - 1)]


def texts_of_run(prompt: TextPrompt) -> tuple[TextPrompt, ...]:
    """Everything that the network is conditioned on at some stage of a run."""
    return prompt.texts if isinstance(prompt, EditedPrompt) else (prompt,)


def at_stage(prompt: TextPrompt, stage: int) -> TextPrompt:
    """What the network is conditioned on at a stage of a run, counted from 0."""
    return prompt.texts[prompt.number(stage)] if isinstance(prompt, EditedPrompt) else prompt


def written_in(syntax: str | None, text: str, timeline: Timeline) -> str:
    """Parse a text in a prompt syntax.

    Args:
        syntax: syntax of the text; None for none.
        text: a prompt.
        timeline: timeline of the run.
    """
    if syntax is None:
        return text
    stages = texts_along(text, timeline)
    return EmphasizedPrompt(text) if stages == (text,) else EditedPrompt(text, stages)


@lru_cache(maxsize=READ_LATELY)
def texts_along(text: str, timeline: Timeline) -> tuple[str, ...]:
    """The text of a prompt at each evaluation of a run; a single entry if it never changes.

    Args:
        text: a prompt.
        timeline: timeline of the run.

    Returns:
        The texts, which end early once there are more than ``MAX_TEXTS`` different ones.
    """
    parts = _parsed(text, timeline)
    if all(isinstance(part, str) for part in parts):
        return (text,)
    found: list[str] = []
    known: dict[str, str] = {}
    for stage in range(timeline.evaluations):
        # AUTOMATIC1111 counts evaluations from 0, but compares that with the number of a text's
        # last evaluation, counted from 1: the first text lasts for one evaluation more.
        said = _said(parts, max(stage, 1))
        found.append(known.setdefault(said, said))
        if len(known) > MAX_TEXTS:
            break
    return tuple(found)


def _said(parts: list[_Part], step: int) -> str:
    said: list[str] = []
    coming = parts[::-1]
    while coming:
        part = coming.pop()
        if isinstance(part, str):
            said.append(part)
        else:
            coming += reversed(part.at(step))
    return "".join(said)


def _parsed(text: str, timeline: Timeline) -> list[_Part]:
    """The parts of a prompt; only the text itself if it has a stray bar or backslash."""
    groups = [_Group("")]
    for match in _PIECE.finditer(text):
        piece = match[0]
        if piece == "\\":
            return [text]
        if piece in ("[", "("):
            groups.append(_Group(piece))
        elif piece in _OPENING:
            if (parts := groups[-1].closed(piece, timeline)) is None:
                # With a stray bracket inside, all open groups can only be plain text.
                groups = [_flat(groups)]
                parts = [piece]
            else:
                groups.pop()
            groups[-1].fields[-1] += parts
        elif piece in (":", "|"):
            groups[-1].marks.append(piece)
            groups[-1].fields.append([])
        else:
            groups[-1].fields[-1].append(piece)
    whole = _flat(groups)
    return [text] if "|" in whole.marks else _joined(whole.as_written())


def _joined(parts: Iterable[_Part]) -> list[_Part]:
    """Merge adjacent texts."""
    found: list[_Part] = []
    for are_texts, own in groupby(parts, key=lambda part: isinstance(part, str)):
        if are_texts:
            found.append("".join(map(str, own)))
        else:
            found += own
    return found


def _flat(groups: Sequence[_Group]) -> _Group:
    """Turn open groups into plain text of the outermost group; their marks stay marks."""
    whole = groups[0]
    for group in groups[1:]:
        whole.fields[-1] += [group.opening, *group.fields[0]]
        whole.marks += group.marks
        whole.fields += group.fields[1:]
    return whole


def _number(parts: Sequence[_Part]) -> str | None:
    """The number that the parts consist of, stripped; None if they are not a number."""
    match parts:
        case [str(text)] if found := _NUMBER.fullmatch(text):
            return found[1]
        case _:
            return None

"""Composable diffusion: several weighted prompts in one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, Field
from typing_extensions import override

from guidance.branch import NEGATIVE, Branch
from guidance.rule import Guided, Rows, Rule, numbers_like

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

    from torch import Tensor


class WeightedPrompt(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """A further prompt of a picture, with its weight."""

    prompt: str = Field(max_length=4096, description="Describes what else the image shows.")
    weight: float = Field(
        default=4.0, ge=-100, le=100, description="Strength; negative values steer away from it."
    )


class Composed(Rule, frozen=True):
    """Composable diffusion (Liu et al., arXiv 2206.01714, section 4).

    Combines the prompts as a product of distributions: ``D = Du + scale (Dc - Du) + sum_i weight_i
    (D_i - Du)``, with the request's own prompt first. A weight below 0 is a negation. Each stage
    takes one evaluation for each prompt and one for the negative prompt, which is the unconditional
    prediction if none is given. Linear, so the result is the same in any space.
    """

    summary: ClassVar[str] = (
        "Several prompts with weights, positive or negative; one evaluation for each."
    )
    source: ClassVar[str] = "Liu et al., arXiv 2206.01714, section 4."
    name: Literal["composed"] = "composed"
    scale: float = Field(
        default=4.0, ge=0, le=100, description="Strength of the request's own prompt."
    )
    prompts: tuple[WeightedPrompt, ...] = Field(
        default=(),
        max_length=8,
        strict=False,
        description="Further prompts with their weights; none is plain CFG.",
    )

    @property
    @override
    def branches(self) -> tuple[Branch, ...]:
        own = tuple(Branch("own", one.prompt) for one in self.prompts if one.weight)
        return (NEGATIVE, *own) if own or self.scale != 1 else ()

    @override
    def rewritten(self, read: Callable[[str], str]) -> Self:
        prompts = (one.model_copy(update={"prompt": read(one.prompt)}) for one in self.prompts)
        return self.model_copy(update={"prompts": tuple(prompts)})

    @classmethod
    @override
    def parameters(  # pyright: ignore[reportIncompatibleMethodOverride] - Self narrows with it
        cls, settings: Sequence[Self], like: Tensor
    ) -> Mapping[str, Tensor]:
        ones = [1] * (like.ndim - 1)
        scales = [setting.scale for setting in settings]
        weights = [[one.weight for one in setting.prompts if one.weight] for setting in settings]
        return {
            "scale": numbers_like(like, scales).view(-1, *ones),
            "weights": numbers_like(like, weights).view(len(settings), -1, *ones),
        }

    @classmethod
    @override
    def combine(cls, rows: Rows, parameters: Mapping[str, Tensor]) -> Guided:
        away = parameters["weights"] * (rows.others[:, 1:] - rows.others[:, :1])
        push = (parameters["scale"] - 1) * (rows.cond - rows.other) + away.sum(1)
        return Guided(rows.cond + push, rows.x, rows.memory)

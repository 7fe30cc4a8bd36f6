"""Guidance for your own sampling loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guidance.rule import Guided, Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from guidance.rule import Rule


def guide(
    rule: Rule,
    cond: Tensor,
    others: Sequence[Tensor],
    x: Tensor,
    alpha: float,
    sigma: float,
    *,
    progress: float = 0.0,
    memory: Tensor | None = None,
    opens_step: bool = True,
    closes_step: bool = True,
) -> Guided:
    """Combine the predictions of pictures that share a rule and a noise level.

    For pictures with different levels or parameters of a rule, stack them as :class:`guidance.Rows`
    and call the rule's ``combine``, as the server does.

    Args:
        rule: the rule, with its parameters.
        cond: denoised predictions for the prompt, ``[rows, C, h, w]``.
        others: one such tensor for each of ``rule.branches``, in the same order.
        x: points that were evaluated, of the shape of ``cond``.
        alpha: signal scale at these points.
        sigma: noise scale at these points, above 0.
        progress: fraction of the sampler's steps done before, in [0, 1).
        memory: memory returned by the previous call; None at the start of a run.
        opens_step: whether this is the first evaluation of the sampler's step.
        closes_step: whether this is the last evaluation of the sampler's step.

    Returns:
        The guided prediction; the point to step from, which CFG++ moves; and the memory to pass to
        the next call.

    Raises:
        ValueError: the number of ``others`` is not that of the rule's branches.
    """
    if len(others) != len(rule.branches):
        raise ValueError(
            f"others has {len(others)} predictions; {rule.name} needs {len(rule.branches)}."
        )
    if memory is None:
        memory = x.new_zeros(len(x), rule.memory_slots, *x.shape[1:])
    if not others:
        return Guided(cond, x, memory)

    def scalar(value: float) -> Tensor:
        return x.new_full((len(x), *[1] * (x.ndim - 1)), value)

    from torch import stack

    rows = Rows(
        cond=cond,
        others=stack(list(others), 1),
        x=x,
        alpha=scalar(alpha),
        sigma=scalar(sigma),
        progress=scalar(progress),
        memory=memory,
        opens_step=scalar(float(opens_step)) > 0,
        closes_step=scalar(float(closes_step)) > 0,
    )
    return rule.combine(rows, rule.parameters([rule] * len(x), x[:1]))

"""What the model's classifier adds to the guidance of a tick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from server.engine.state.batch import References
from server.engine.state.padding import padded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Listed

    from torch import Tensor

    from server.engine.state.batch import Batch
    from server.engine.task import Aim
    from server.models.conditioning import Conditioning


def choose(batch: Batch) -> References:
    """Let the classifier read x, and choose what each image's reference is told.

    Args:
        batch: with images whose stage has a reference.
    """
    positions, rows = list(batch.referred), list(batch.referred.values())
    sequences = [batch.sequences[i] for i in positions]
    aims = [batch.aims[i] for i in positions]
    x = batch.columns[:, 0].index_select(0, batch.lane.indices(positions))
    alpha, sigma = _levels(batch, positions, [False] * len(positions))
    inputs = (padded(one, batch.fixed_rows) for one in (x, alpha, sigma))
    seen = batch.lane.model.classify(*inputs)
    choices, strengths = torch.empty_like(alpha, dtype=torch.int64), torch.empty_like(alpha)
    for kind, members in _by_kind(aims).items():
        where = batch.lane.indices(members)
        reference = kind.refer(*_of(members, aims, seen))
        choices.index_copy_(0, where, reference.choice)
        strengths.index_copy_(0, where, reference.strength)
    told: list[Conditioning] = []
    first: list[int] = []
    for sequence, aim in zip(sequences, aims, strict=True):
        first.append(len(told))
        # The alternatives are the last of an image's prompts.
        told += sequence.conditioning[-len(aim.alternatives) :]
    chosen = batch.lane.model.stack(told).select(batch.lane.indices(first) + choices)
    scales = alpha.new_tensor([sequence.ask.reference for sequence in sequences])
    return References(positions, rows, chosen, scales * strengths)


def push(batch: Batch, denoised: Tensor) -> None:
    """Move guided predictions up the gradient of what their images ask of the classifier.

    Args:
        batch: with images whose stage has a gradient.
        denoised: guided predictions ``[images, C, h, w]``, moved in place.
    """
    positions = batch.pushed
    aims = [batch.aims[i] for i in positions]
    clean = [aim.guidance.shows == "denoised" for aim in aims]
    where = batch.lane.indices(positions)
    shown = denoised.index_select(0, where)
    for row, reads_clean in enumerate(clean):
        if not reads_clean:
            shown[row] = batch.columns[positions[row], 0]
    # Tensors of inference mode carry no gradients; copies that are made outside of it do.
    with torch.inference_mode(mode=False), torch.enable_grad():
        x = padded(shown.clone(), batch.fixed_rows).requires_grad_()
        levels = (padded(one, batch.fixed_rows) for one in _levels(batch, positions, clean))
        seen = batch.lane.model.classify(x, *levels)
        [gradient] = torch.autograd.grad(_objective(aims, seen), x)
    scales = shown.new_tensor([batch.sequences[i].ask.push for i in positions])
    moves = scales.view(-1, *[1] * (shown.ndim - 1)) * gradient[: len(positions)]
    denoised.index_add_(0, where, moves)


def _objective(aims: Listed[Aim], seen: Mapping[str, Tensor]) -> Tensor:
    """Summed over the rows: each moves by its own summand alone."""
    summands: list[Tensor] = []
    for kind, members in _by_kind(aims).items():
        logits, targets = _of(members, aims, seen)
        settings = [aims[i].guidance for i in members]
        parameters = kind.parameters(settings, next(iter(logits.values())))
        summands.append(kind.objective(logits, targets, parameters).sum())
    return torch.stack(summands).sum()


def _of(
    members: Listed[int], aims: Listed[Aim], seen: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits ``[members, classes]`` of each attribute, and the class aimed at ``[members]``."""
    device = next(iter(seen.values())).device
    where = torch.tensor(members, device=device)
    targets = torch.tensor([aims[i].targets for i in members], device=device).unbind(1)
    logits = {name: values.index_select(0, where) for name, values in seen.items()}
    return logits, dict(zip(seen, targets, strict=True))


def _by_kind(aims: Listed[Aim]) -> dict[Any, list[int]]:
    kinds: dict[Any, list[int]] = {}
    for i, aim in enumerate(aims):
        kinds.setdefault(type(aim.guidance), []).append(i)
    return kinds


def _levels(batch: Batch, positions: Listed[int], clean: Listed[bool]) -> tuple[Tensor, ...]:
    """Scales ``[rows]`` of signal and noise in what the classifier reads."""
    levels: list[tuple[float, float]] = []
    for i, reads_clean in zip(positions, clean, strict=True):
        plan, stage = batch.plans[i], batch.sequences[i].stage
        levels.append((1.0, 0.0) if reads_clean else (plan.alpha[stage], plan.sigma[stage]))
    return torch.tensor(levels).to(batch.lane.model.device).unbind(1)

"""Notes about how a request was read and which settings a model's convention chose for it."""

from __future__ import annotations

from server.models.emphasis import is_weighted
from server.models.hosted import HostedModel
from server.requests.defaults import own_defaults
from server.requests.foreign_names import shown
from server.requests.schema import GenerateRequest, ResolvedRequest

__all__ = ["notes_for"]


def notes_for(
    request: GenerateRequest, resolved: ResolvedRequest, model: HostedModel
) -> tuple[str, ...]:
    """Return one sentence for each setting that was translated, and one about those chosen.

    Args:
        request: request as sent.
        resolved: same request with every default filled in.
        model: model that will serve it.
    """
    read = request.reading.notes
    if request.reading.rule_left_out:
        scale = getattr(resolved.guidance, "scale", None)
        rule = {"name": resolved.guidance.name} | ({} if scale is None else {"scale": scale})
        read = (*read, f"guidance names no rule and is {shown(rule)}.")
    texts = (request.prompt, request.negative_prompt or "")
    if request.prompt_syntax != resolved.prompt_syntax and any(map(is_weighted, texts)):
        read = (
            *read,
            f"Weights and changes in prompts are read as plain text by model {model.facts.name!r}.",
        )
    if request.clip_skip != resolved.clip_skip:
        read = (*read, f"clip_skip is ignored, as model {model.facts.name!r} does not support it.")
    if any(
        asked.precedence != one.precedence
        for asked, one in zip(request.controls, resolved.controls, strict=True)
    ):
        read = (
            *read,
            f"precedence of ControlNets is ignored, as model {model.facts.name!r} has no U-Net.",
        )
    own = own_defaults(model, resolved.adapters)
    if own is None:
        return read
    guidance = f"guidance {resolved.guidance.name!r}"
    if resolved.guidance.policy.embeds:
        guidance += f" with policy {resolved.guidance.policy.name!r}"
    if resolved.guidance.cfg_norm is not None:
        guidance += " with cfg_norm"
    said = {
        "sampler": f"sampler {resolved.sampler.name!r}",
        "spacing": f"spacing {resolved.spacing.name!r}",
        "steps": f"steps {resolved.steps}",
        "guidance": guidance,
    }
    chosen = [text for field, text in said.items() if getattr(request, field) is None]
    if request.reading.habitual and request.guidance not in (None, resolved.guidance):
        read = (*read, f"Guidance is that of model {model.facts.name!r}: {guidance}.")
    if not chosen:
        return read
    return (
        *read,
        f"Chosen for model {model.facts.name!r}, which is sampled by the convention "
        f"{own.convention!r} because {own.reason}: {', '.join(chosen)}.",
    )

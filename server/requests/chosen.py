"""Says which settings a model's convention chose for a request that left them out."""

from __future__ import annotations

from server.models.hosted import HostedModel
from server.requests.defaults import own_defaults
from server.requests.schema import GenerateRequest, ResolvedRequest

__all__ = ["notes_for"]


def notes_for(
    request: GenerateRequest, resolved: ResolvedRequest, model: HostedModel
) -> tuple[str, ...]:
    """One sentence about what was chosen for a distilled model; none where nothing was.

    Args:
        request: as sent.
        resolved: the same with every default filled in.
        model: that will serve it.
    """
    own = own_defaults(model, resolved.adapters)
    if own is None:
        return ()
    guidance = f"guidance {resolved.guidance.name!r}"
    if resolved.guidance.policy.embeds:
        guidance += f" with policy {resolved.guidance.policy.name!r}"
    said = {
        "sampler": f"sampler {resolved.sampler.name!r}",
        "spacing": f"spacing {resolved.spacing.name!r}",
        "steps": f"steps {resolved.steps}",
        "guidance": guidance,
    }
    chosen = [text for field, text in said.items() if getattr(request, field) is None]
    if not chosen:
        return ()
    return (
        f"Chosen for model {model.facts.name!r}, which is sampled by the convention "
        f"{own.convention!r} because {own.reason}: {', '.join(chosen)}.",
    )

"""Images that depend on each other or on a picture: refused where they cannot, else made ready."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guidance import NegToMe
from samplers import Plan
from samplers.reverse_sde import follows_reverse_sde
from server.engine.task import Avoided, Group
from server.errors import InvalidRequest
from server.models.hosted import HostedModel
from server.requests.guidance_check import check_window
from server.requests.schema import Guidance, ResolvedRequest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["avoided_of", "check_group", "group_of", "is_group"]

PARTICLES = "guidance.particles"
NEGTOME = "guidance.negtome"


def is_group(guidance: Guidance) -> bool:
    """Whether the images of a request depend on each other."""
    return guidance.particles is not None or _is_of_images(guidance.negtome)


def check_group(
    resolved: ResolvedRequest, model: HostedModel, *, has_picture: bool, has_reference: bool
) -> None:
    """Refuse images that could not act on each other, or avoid a picture, as the request says.

    Args:
        resolved: the request.
        model: that will serve it.
        has_picture: whether the run starts from a picture.
        has_reference: whether there is a picture to keep away from.

    Raises:
        InvalidRequest: one image alone, no picture to keep away from or nothing that does, guidance
            that does not go with it, or layers that the model lacks.
    """
    guidance = resolved.guidance
    _check_reference(guidance.negtome, has_reference=has_reference)
    if is_group(guidance) and resolved.n < 2:
        needs = f"{PARTICLES} needs at least 2 images"
        if guidance.particles is None:
            needs = f"{NEGTOME} needs at least 2 images, or a picture in `reference`"
        raise InvalidRequest("n", f"n is {resolved.n}; {needs}.")
    if guidance.particles is not None and (
        reason := _against_particles(guidance, has_picture=has_picture)
    ):
        raise InvalidRequest(PARTICLES, f"{PARTICLES} is {guidance.particles.name!r}; {reason}.")
    if guidance.negtome is not None and (
        reason := _against_negtome(guidance, guidance.negtome, model)
    ):
        raise InvalidRequest(NEGTOME, f"{NEGTOME}: {reason}.")


def group_of(resolved: ResolvedRequest, plan: Plan) -> Group | None:
    """The group that all images of the request form; None where each is by itself.

    Raises:
        InvalidRequest: the sampler's noise is not what particles need, or no step lies in the
            window in which images are to keep apart.
    """
    guidance = resolved.guidance
    if not is_group(guidance):
        return None
    if guidance.particles is not None and not follows_reverse_sde(plan):
        raise InvalidRequest(
            "sampler",
            f"sampler is {resolved.sampler.name!r}; {PARTICLES} needs one that draws the noise of "
            "the reverse diffusion, in one evaluation a step; allowed are: 'ddim' with eta 1, "
            "'euler_ancestral' with eta 1, 'dpm_solver_pp' with variant 'sde', 'sa_solver' with "
            "tau 1.",
        )
    if guidance.negtome is not None:
        check_window(guidance.negtome, plan, NEGTOME, "its window")
    return Group(particles=guidance.particles, apart=guidance.negtome)


def avoided_of(resolved: ResolvedRequest, plan: Plan, reference: Tensor | None) -> Avoided | None:
    """What every image of the request keeps away from, if that is a picture.

    Args:
        resolved: the request.
        plan: of its sampler.
        reference: the picture, ``[3, H, W]`` float32 in [-1, 1].

    Raises:
        InvalidRequest: no step lies in the window in which they do.
    """
    negtome = resolved.guidance.negtome
    if reference is None or negtome is None:
        return None
    check_window(negtome, plan, NEGTOME, "its window")
    return Avoided(reference, negtome)


def _is_of_images(negtome: NegToMe | None) -> bool:
    """Whether images keep away from another one of their request."""
    return negtome is not None and negtome.away_from != "reference"


def _check_reference(negtome: NegToMe | None, *, has_reference: bool) -> None:
    if negtome is None and has_reference:
        raise InvalidRequest(
            "reference", f"reference needs {NEGTOME}; ask for that or leave reference out."
        )
    if negtome is None or has_reference == (negtome.away_from == "reference"):
        return
    field = f"{NEGTOME}.away_from"
    if has_reference:
        raise InvalidRequest(
            "reference",
            f"reference is of no use where {field} is {negtome.away_from!r}; leave one out.",
        )
    raise InvalidRequest(
        field, f"{field} is {negtome.away_from!r}; it needs a picture, so send `reference`."
    )


def _against_particles(guidance: Guidance, *, has_picture: bool) -> str | None:
    if has_picture:
        return "its weights are those of a run from nothing, so leave `image` out"
    if guidance.name != "cfg":
        return f"it corrects the rule 'cfg', and cannot {guidance.name!r}"
    if not guidance.branches:
        return "at a scale of 1 there is no guidance to correct; take another, or leave it out"
    if guidance.policy.name != "always":
        return f"it weighs every step, so the policy must be 'always', not {guidance.policy.name!r}"
    for field in ("perturbed", "classifier", "negtome"):
        if getattr(guidance, field):
            return f"its weights are those of 'cfg' alone, so leave guidance.{field} out"
    return None


def _against_negtome(guidance: Guidance, negtome: NegToMe, model: HostedModel) -> str | None:
    if guidance.policy.adapts and _is_of_images(negtome):
        return (
            f"the policy {guidance.policy.name!r} ends guidance for each image by itself, and then "
            "their predictions have no counterparts; take another policy, or send a picture in "
            "`reference`"
        )
    if reason := model.refuses(negtome.edit):
        return f"model {model.facts.name!r} {reason}"
    return None

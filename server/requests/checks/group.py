"""Checks on images that depend on each other, or on a reference picture."""

from __future__ import annotations

from guidance import NegToMe
from guidance.parts import PARTS
from samplers import Plan
from samplers.reverse_sde import follows_reverse_sde
from server.errors import InvalidRequest
from server.requests.schema import Guidance, ResolvedRequest

__all__ = ["check_group", "check_noise_of_particles", "is_group"]

PARTICLES = "guidance.particles"
NEGTOME = "guidance.negtome"


def is_group(guidance: Guidance) -> bool:
    """Return whether the images of a request depend on each other."""
    return guidance.particles is not None or _is_of_images(guidance.negtome)


def check_group(resolved: ResolvedRequest, *, has_picture: bool, has_reference: bool) -> None:
    """Refuse images that cannot act on each other, or move away from a picture, as requested.

    Args:
        resolved: the request.
        has_picture: whether the run starts from an image.
        has_reference: whether an image to move away from was sent.

    Raises:
        InvalidRequest: a single image, a missing or unused reference picture, or guidance that is
            incompatible with it.
    """
    guidance = resolved.guidance
    _check_reference(guidance.negtome, has_reference=has_reference)
    if is_group(guidance) and resolved.n < 2:
        needs = f"{PARTICLES} needs at least 2 images"
        if guidance.particles is None:
            needs = f"{NEGTOME} needs at least 2 images, or an image in `reference`"
        raise InvalidRequest("n", f"n is {resolved.n}; {needs}.")
    if guidance.particles is not None and (
        reason := _against_particles(resolved, has_picture=has_picture)
    ):
        raise InvalidRequest(PARTICLES, f"{PARTICLES} is {guidance.particles.name!r}; {reason}.")
    if reason := _against_negtome(guidance):
        raise InvalidRequest(NEGTOME, f"{NEGTOME}: {reason}.")


def check_noise_of_particles(resolved: ResolvedRequest, plan: Plan) -> None:
    """Refuse particles with a sampler whose noise is not that of the reverse diffusion.

    Raises:
        InvalidRequest: the plan draws less or more noise, or evaluates a step more than once.
    """
    if resolved.guidance.particles is not None and not follows_reverse_sde(plan):
        raise InvalidRequest(
            "sampler",
            f"sampler is {resolved.sampler.name!r}; {PARTICLES} needs a sampler that draws the "
            "noise of the reverse diffusion and evaluates each step once; allowed are: 'ddim' with "
            "eta 1, 'euler_ancestral' with eta 1, 'dpm_solver_pp' with variant 'sde', 'sa_solver' "
            "with tau 1.",
        )


def _is_of_images(negtome: NegToMe | None) -> bool:
    """Return whether the images move away from the first image of their request."""
    return negtome is not None and negtome.away_from != "reference"


def _check_reference(negtome: NegToMe | None, *, has_reference: bool) -> None:
    if negtome is None and has_reference:
        raise InvalidRequest(
            "reference",
            f"reference has no effect without {NEGTOME}; add that or leave reference out.",
        )
    if negtome is None or has_reference == (negtome.away_from == "reference"):
        return
    field = f"{NEGTOME}.away_from"
    if has_reference:
        raise InvalidRequest(
            "reference",
            f"reference has no effect while {field} is {negtome.away_from!r}; leave one out.",
        )
    raise InvalidRequest(
        field, f"{field} is {negtome.away_from!r}, which needs an image; send `reference`."
    )


def _against_particles(resolved: ResolvedRequest, *, has_picture: bool) -> str | None:
    guidance = resolved.guidance
    if resolved.variation is not None:
        return "particles need seeds of their own, so leave `variation` out"
    if has_picture:
        return "particles need a run from pure noise, so leave `image` out"
    if not guidance.plain_cfg:
        return f"it corrects the rule 'cfg' and is incompatible with {guidance.name!r}"
    if not guidance.branches:
        return "at scale 1 there is no guidance to correct; choose another scale or leave it out"
    if guidance.policy.skips:
        return (
            f"it needs guidance at every step, so the policy {guidance.policy.name!r} is "
            "incompatible; leave guidance.policy out"
        )
    for part in PARTS:
        if not part.beside_particles and getattr(guidance, part.field) != part.left_out:
            return f"its weights hold for 'cfg' alone, so leave guidance.{part.field} out"
    return None


def _against_negtome(guidance: Guidance) -> str | None:
    if guidance.policy.adapts and _is_of_images(guidance.negtome):
        return (
            f"the policy {guidance.policy.name!r} ends guidance for each image independently, but "
            "these images need each other's predictions; choose another policy, or send an image "
            "in `reference`"
        )
    return None

"""Conversion of a prepared request into the engine's tasks: one per image, all on one plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from guidance.parts import chosen
from server.engine.scheduler import Priority
from server.engine.state.noise import Variation
from server.engine.task import Group, ImageTask, RepaintedFrom, Stream
from server.engine.terms.registry import terms_of
from server.engine.terms.term import Run
from server.models.adapters.adapter import Weighted
from server.models.blend import Blend
from server.models.controls.control import ControlUse
from server.models.embeddings.embedding import Embedding
from server.models.hosted import HostedModel
from server.models.image_prompts.image_prompt import ImagePromptUse
from server.models.prompt_editing import written_in
from server.models.references import SeenPicture
from server.models.text_options import TextOptions
from server.requests.adapters import load_adapters
from server.requests.checks.group import is_group
from server.requests.embeddings import load_embeddings, texts_of
from server.requests.resolve import Prepared
from server.requests.schema import MaskContent, ResolvedRequest, split

__all__ = ["alone", "tasks_of"]

REPAINTED_FROM: Final[Mapping[MaskContent, RepaintedFrom]] = {
    "latent_noise": "noise",
    "latent_nothing": "nothing",
}
"""Start of the repainted part if it is not the image, which `fill` changes beforehand."""


def alone(resolved: ResolvedRequest, index: int) -> ResolvedRequest:
    """Return the request for a single one of its images, counted from 0.

    Images of a group differ if they are made alone.
    """
    variation, seed = resolved.variation, resolved.seed + index
    if variation is None:
        return resolved.model_copy(update={"seed": seed, "n": 1})
    if variation.seed is None:
        raise ValueError("variation has no seed; the request is not resolved")
    other = variation.model_copy(update={"seed": variation.seed + index})
    return resolved.model_copy(update={"variation": other, "n": 1})


def tasks_of(
    prepared: Prepared,
    model: HostedModel,
    *,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    kept: Tensor | None = None,
    reference: Tensor | None = None,
    blend: Blend | None = None,
    stream: Stream | None = None,
    adapters: tuple[Weighted, ...] | None = None,
    embeddings: tuple[Embedding, ...] | None = None,
    controls: tuple[ControlUse, ...] = (),
    image_prompts: tuple[ImagePromptUse, ...] = (),
    references: tuple[Tensor, ...] = (),
    seen: tuple[SeenPicture, ...] = (),
) -> list[ImageTask]:
    """Return one task for each image.

    Args:
        prepared: checked request with the plan of its sampler.
        model: model that will serve it.
        image: picture to start from, ``[3, H, W]`` float32 in [-1, 1].
        mask: mask, ``[H, W]`` float32, 1 to repaint, 0 to keep.
        kept: picture as it was sent, if the part to repaint has been filled in ``image``.
        reference: picture to move away from, as ``image``.
        blend: blend that the network is conditioned on instead of the request's prompt.
        stream: stream that the images are frames of; their priority is then live.
        adapters: adapters of the request, if they are loaded already.
        embeddings: embeddings of its texts, if they are loaded already.
        controls: loaded ControlNets of the request.
        image_prompts: loaded image prompts of the request.
        references: reference images, ``[3, H, W]`` float32 in [-1, 1] of any sizes.
        seen: reference images for the text encoder, if it reads them.

    Raises:
        InvalidRequest: guidance needs a single prompt, but there is a blend.
        Overloaded: the adapters or embeddings of running requests leave no room for those of this
            request.
    """
    resolved, plan = prepared.request, prepared.plan
    rule, policy = split(resolved.guidance)

    def read(text: str) -> str:
        return written_in(resolved.prompt_syntax, text, prepared.timeline)

    rule = rule.rewritten(read)
    prompt = read(resolved.prompt) if blend is None else blend
    away_from = model.negative(resolved.negative_prompt)
    negative_prompt = None if away_from is None else read(away_from)
    run = Run(
        model=model,
        schedule=model.schedule(resolved.width, resolved.height, resolved.steps),
        plan=plan,
        rule=rule,
        prompt=prompt,
        negative_prompt=negative_prompt,
        reference=reference,
    )
    terms = terms_of((setting for _, setting in chosen(resolved.guidance)), run)
    if adapters is None:
        adapters = load_adapters(resolved.adapters, model)
    if embeddings is None:
        embeddings = load_embeddings([text for _, text in texts_of(resolved, model)], model)
    # A network that reads the picture as an input does not need it in x, and was not trained so.
    from_noise = mask is not None and model.facts.reads_mask and resolved.strength == 1
    size = resolved.noise_size
    group = Group() if is_group(resolved.guidance) else None
    return [
        ImageTask(
            model=model.facts.name,
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=resolved.width,
            height=resolved.height,
            seed=one.seed,
            variation=_variation(one),
            noise_size=None if size is None else (size.width, size.height),
            plan=plan,
            rule=rule,
            policy=policy,
            terms=terms,
            cache=resolved.cache,
            text=TextOptions(resolved.clip_skip, embeddings, seen),
            adapters=adapters,
            controls=controls,
            image_prompts=image_prompts,
            references=references,
            coefficients=prepared.coefficients,
            group=group,
            priority=Priority[resolved.priority.upper()] if stream is None else Priority.LIVE,
            stream=stream,
            image=image,
            mask=mask,
            kept=kept,
            repainted_from=REPAINTED_FROM.get(resolved.mask_content or "original", "image"),
            from_noise=from_noise,
            tiny=resolved.autoencoder == "tiny",
            undecoded=resolved.hires is not None and resolved.hires.of_latents,
            previews=resolved.stream,
        )
        for one in (alone(resolved, index) for index in range(resolved.n))
    ]


def _variation(resolved: ResolvedRequest) -> Variation | None:
    chosen = resolved.variation
    if chosen is None or chosen.seed is None:
        return None
    return Variation(chosen.seed, chosen.strength)

"""Admission: turns a task into a state in the pool, with its encodings and start latents."""

from __future__ import annotations

import logging
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from server.engine.faults import attempt
from server.engine.state.noise import start_noise, varied_noise
from server.engine.state.prompt_cache import PromptCache
from server.engine.state.sequence import InpaintingData
from server.engine.tick.image_prompts import ImagePromptCache, keys_and_values_for
from server.engine.tick.pictures import encode_pictures, latents_of
from server.models.blend import conditioning_of, texts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, MutableMapping

    from torch import Tensor

    from server.engine.state.lane import Lane
    from server.engine.state.sequence import Sequence
    from server.engine.task import ImageTask
    from server.models.adapters.adapter import Weighted
    from server.models.blend import TextPrompt
    from server.models.conditioning import Conditioning
    from server.models.hosted import HostedModel
    from server.models.text_options import TextOptions

log = logging.getLogger(__name__)

Prompts: TypeAlias = "tuple[str | None, ...]"
"""All texts that must be encoded for an image; None is the model's unconditional input."""

Likeness: TypeAlias = "tuple[str, int, int, tuple[Weighted, ...], TextOptions, bool]"
"""Model, width, height, adapters, options, and whether the autoencoder is the tiny one: images with
equal ones share encoder calls."""


class Start(NamedTuple):
    """The initial x of a run, ``[C, h, w]``, and the latents of the picture it starts from."""

    x: Tensor
    latents: Tensor | None = None


class Admission:
    """Gives newcomers their lane, their conditioning and their first state.

    Args:
        models: hosted models by name.
        lane_of: function that returns the lane for a task, its conditioning and the number of rows
            that it needs at once in a forward pass; makes the lane if there is none.
        encoder_of: function that returns the function that encodes pictures for a model, by its
            tiny autoencoder or its own; it replaces ``HostedModel.encode_image``.
        deterministic: whether to encode prompts and pictures at fixed batch sizes.
    """

    def __init__(
        self,
        models: Mapping[str, HostedModel],
        lane_of: Callable[[ImageTask, list[Conditioning], int], Lane],
        encoder_of: Callable[[HostedModel, bool], Callable[[Tensor], Tensor]],
        *,
        deterministic: bool,
    ) -> None:
        self._models = models
        self._lane_of = lane_of
        self._encoder_of = encoder_of
        self._deterministic = deterministic
        self._prompts: dict[str, PromptCache] = {}
        self._image_prompts: dict[str, ImagePromptCache] = {}
        self._references: dict[tuple[str, bool], MutableMapping[Tensor, Tensor]] = {}
        for name, model in models.items():
            self.add(name, model)

    def add(self, name: str, model: HostedModel) -> None:
        """Accept images of a model from now on."""
        self._prompts[name] = PromptCache(model, fixed=self._deterministic)
        self._image_prompts[name] = ImagePromptCache(model, fixed=self._deterministic)
        # Entries live as long as the pictures, which a stream releases together with its settings.
        for tiny in (False, True):
            self._references[name, tiny] = WeakTensorKeyDictionary()

    def forget(self, name: str) -> None:
        """Release a model and its encoded prompts; none of its images may follow."""
        del self._prompts[name], self._image_prompts[name]
        del self._references[name, False], self._references[name, True]

    def admit(self, newcomers: list[Sequence]) -> Iterator[tuple[Sequence, Exception]]:
        """Make the newcomers ready to run; yield those that fail, with the error."""
        alike: dict[Likeness, dict[Sequence, Prompts]] = {}
        for sequence in newcomers:
            task = sequence.task
            prompts = attempt(lambda one=sequence: _prompts(one), self._models[task.model].device)
            if isinstance(prompts, Exception):
                log.error("the prompts of an image could not be read", exc_info=prompts)
                yield sequence, prompts
                continue
            of_text = tuple(one for one in task.adapters if one.adapter.changes_text)
            key = task.model, task.width, task.height, of_text, task.text, task.tiny
            alike.setdefault(key, {})[sequence] = prompts
        for (name, width, height, of_text, options, tiny), prompts_of in alike.items():
            members = list(prompts_of)
            prompts = chain.from_iterable(prompts_of.values())
            encoded = self._prompts[name].of(prompts, width, height, of_text, options)
            model, kept = self._models[name], self._references[name, tiny]
            encode = self._encoder_of(model, tiny)
            encode_pictures(model, members, kept, encode, fixed=self._deterministic)
            self._image_prompts[name].encode(members)
            for sequence in members:
                placed = attempt(
                    lambda one=sequence, texts=encoded: self._place(one, texts),
                    self._models[name].device,
                )
                if placed is not None:
                    log.error("an image could not be started", exc_info=placed)
                    yield sequence, placed

    def _place(
        self, sequence: Sequence, encoded: Mapping[str | None, Conditioning | Exception]
    ) -> None:
        task = sequence.task
        prompts = sequence.guidance.texts
        known = {text: _known(encoded[text]) for one in prompts for text in texts_of(one)}
        texts = {one: conditioning_of(one, known) for one in prompts}
        sequence.conditioning = self._beside_pictures(sequence, texts)
        conditioning = list(sequence.conditioning.values())
        lane = self._lane_of(task, conditioning, sequence.rows_at_once)
        sequence.lane = lane
        start = _start(sequence, lane)
        guidance = sequence.guidance
        sequence.slot = lane.pool.take(
            task.plan.slots, task.rule.memory_slots, guidance.policy_slots, guidance.cache_slots
        )
        lane.pool.columns[sequence.slot, 0] = start.x
        keeps = guidance.policy_slots > 0
        if keeps and task.policy.wants_reference and start.latents is not None:
            lane.pool.policy_memory[sequence.slot, 0] = start.latents

    def _beside_pictures(
        self, sequence: Sequence, texts: Mapping[TextPrompt, Conditioning]
    ) -> dict[TextPrompt, Conditioning]:
        """All conditioning of an image, in equal lengths, combined with its reference images."""
        model, task = self._models[sequence.task.model], sequence.task
        levelled = model.equalize_lengths(texts)
        if not task.references:
            return levelled
        references = [latents_of(sequence, one) for one in task.references]
        return {prompt: model.add_references(text, references) for prompt, text in levelled.items()}


def _known(conditioning: Conditioning | Exception) -> Conditioning:
    if isinstance(conditioning, Exception):
        raise conditioning
    return conditioning


def _prompts(sequence: Sequence) -> Prompts:
    return tuple(chain.from_iterable(texts_of(prompt) for prompt in sequence.guidance.texts))


def _start(sequence: Sequence, lane: Lane) -> Start:
    task, plan = sequence.task, sequence.task.plan
    inner = None if task.noise_size is None else lane.model.latent_shape(*task.noise_size)
    noise = varied_noise(task.seed, lane.shape, task.variation, inner).to(lane.model.device)
    # Made again on each call, since a failed start may be retried.
    sequence.term_states = [
        term.begin(None if term.picture is None else latents_of(sequence, term.picture), noise)
        for term in task.terms
    ]
    sequence.channels = _channels(sequence, lane)
    sequence.hints = _hints(sequence, lane)
    sequence.shown = keys_and_values_for(sequence)
    if task.latents is not None:
        latents = task.latents.to(noise)
    elif task.image is not None:
        latents = latents_of(sequence, task.image)
    else:
        return Start(plan.start_scale * noise)
    if task.from_noise:
        return Start(plan.start_scale * noise, latents)
    if task.mask is not None:
        repaint = _latent_mask(task.mask, lane)
        if sequence.channels is None:
            sequence.known = InpaintingData(latents, noise, repaint)
        latents = _repainted(task, latents, repaint)
    return Start(float(plan.alpha[0]) * latents + float(plan.sigma[0]) * noise, latents)


def _repainted(task: ImageTask, latents: Tensor, repaint: Tensor) -> Tensor:
    """The latents that a run starts from, with the repainted area filled as requested."""
    match task.repainted_from:
        case "image":
            return latents
        case "noise":
            # As in AUTOMATIC1111, the noise of the seed alone, without variations or another size.
            return torch.lerp(latents, start_noise(task.seed, latents.shape).to(latents), repaint)
        case "nothing":
            return latents * (1 - repaint)


def _channels(sequence: Sequence, lane: Lane) -> Tensor | None:
    """Extra input channels behind the latent, made once for all images of a request."""
    task, made = sequence.task, sequence.submission.channels
    key = id(task.mask), task.width, task.height
    if key not in made:
        made[key] = lane.model.channels(task.image, task.mask, task.width, task.height)
    return made[key]


def _hints(sequence: Sequence, lane: Lane) -> tuple[Tensor, ...]:
    """ControlNet hints made from their pictures, once for all images of a request."""
    uses, kind, made = sequence.task.controls, lane.model.control_kind, sequence.submission.hints
    if kind is None:
        return ()
    for use in uses:
        if id(use) not in made:
            made[id(use)] = kind.hint(use.control.network, use.picture)
    return tuple(made[id(use)] for use in uses)


def _latent_mask(mask: Tensor, lane: Lane) -> Tensor:
    """Mask at latent size, ``[1, h, w]``; a cell is repainted if any of its pixels is."""
    cells = F.adaptive_max_pool2d(mask[None, None].to(lane.model.device), lane.shape[1:])
    return cells[0]

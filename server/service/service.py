"""Admits requests to the engine and follows them to their end; HTTP never handles tensors."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from samplers import StatisticsIdentity
from server.decoding.pool import DecodePool
from server.engine.client import ANONYMOUS, Client
from server.engine.engine import Engine
from server.engine.reservation import Reservation
from server.engine.task import ImageTask
from server.errors import DuplicateGeneration, NotReady, UnknownGeneration, WeftError
from server.models.hosted import HostedModel
from server.models.references import SeenPicture
from server.models.statistics import guidance_name
from server.requests.catalog import (
    ModelEntry,
    adapter_entries,
    control_entries,
    defaults_of,
    embedding_entries,
    image_prompt_entries,
)
from server.requests.checks.limits import check_count, runs_of
from server.requests.controls import load_controls, unloaded_controls
from server.requests.embeddings import texts_of
from server.requests.image_prompts import unloaded_image_prompts
from server.requests.reference_images import check_references, largest_of, max_reference_images
from server.requests.resolve import Prepared
from server.requests.schema import GenerateRequest, ResolvedRequest
from server.requests.second_run import naming_hires
from server.requests.tasks import tasks_of
from server.service.editing import as_edit
from server.service.enlarging import started_from
from server.service.generation import Generation
from server.service.image_prompt_uses import image_prompt_uses, rescale_regions
from server.service.model_shelf import Lease, ModelShelf, ModelState, Source
from server.service.pictures import Picture, Pictures, encoded, pictures_of
from server.service.pixels import mask_tensor, pixels_tensor
from server.service.planner import Planner
from server.service.second_run import SecondRun
from server.service.uploads import Uploads, decode_for_size, decoded
from server.service.waiting_line import WaitingLine
from server.settings import Limits

__all__ = ["Service"]

Result = TypeVar("Result")

UPLOADS_WAITING = 64
"""Maximum number of uploaded images that wait to be decoded."""


class Service:
    """Accepts requests once an engine is running; until then every request is refused.

    Args:
        limits: limits for one request, set by the operator.
        decode_processes: number of uploaded images decoded at once.
        load_s: seconds that a request waits for its model to be loaded.

    Attributes:
        outcomes: number of requests by outcome.
        decoding: pool that decodes uploaded images.
        planner: planner that prepares requests.
        leaving: event that is set once the server is about to stop; handlers of open-ended
            connections end them then.
    """

    def __init__(self, limits: Limits, *, decode_processes: int = 2, load_s: float = 300.0) -> None:
        self.outcomes: Counter[str] = Counter()
        self.decoding = DecodePool(limits, processes=decode_processes, waiting=UPLOADS_WAITING)
        self.planner = Planner(limits)
        self.leaving = asyncio.Event()
        self._limits = limits
        self._engine: Engine | None = None
        self._load_s = load_s
        self._shelf: ModelShelf | None = None
        self._leases: dict[Generation, Lease] = {}
        self._failure: str | None = None
        self._under_way: dict[str, Generation] = {}
        self._line = WaitingLine()
        # Weights are loaded one after another. A request that waits for that must not occupy the
        # threads that all other requests need.
        self._weights = ThreadPoolExecutor(1, thread_name_prefix="weft-weights")

    def open(
        self, engine: Engine, models: Mapping[str, HostedModel], source: Source | None = None
    ) -> None:
        """Accept requests from now on.

        Args:
            engine: engine that runs the models.
            models: loaded models; the first is the default.
            source: source of others when a request names them.
        """
        self._shelf = ModelShelf(engine, models, source, self._load_s)
        self._engine = engine

    def close(self) -> None:
        """End the processes that decode uploads, and the threads that load weights."""
        self.decoding.close()
        self._weights.shutdown(wait=False)
        if self._shelf is not None:
            self._shelf.close(self._farewell())

    def give_up(self, reason: str) -> None:
        """Refuse all requests from now on, because the models could not be loaded."""
        self._failure = reason

    def drain(self) -> None:
        """Refuse new requests from now on; running requests continue."""
        self.leaving.set()

    def abandon(self) -> None:
        """End all running requests, and loads that are waited for, with :class:`NotReady`."""
        for generation in list(self._under_way.values()):
            generation.abandon(self._farewell())
        if self._shelf is not None:
            self._shelf.close(self._farewell())

    @property
    def engine(self) -> Engine | None:
        """The engine, or None while the models are loading."""
        return self._engine

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        if self.broken is not None or self.leaving.is_set():
            return False
        return self._engine is not None and self._engine.ready

    @property
    def broken(self) -> str | None:
        """Why this process can never serve again; None if it can."""
        if self._failure is None and self._engine is not None and self._engine.failure:
            failure = self._engine.failure
            if isinstance(failure, WeftError):
                return failure.message
            return f"The engine stopped: {type(failure).__name__}."
        return self._failure

    def ready_engine(self) -> Engine:
        """Return the engine, loaded and warmed up.

        Raises:
            NotReady: it is still loading, about to stop, or broken.
        """
        if self.broken or self.leaving.is_set():
            raise self._farewell()
        if self._engine is None or not self.ready:
            raise NotReady("The model is still loading.")
        return self._engine

    def check_room(self, client: Client = ANONYMOUS) -> None:
        """Refuse a request that could not be admitted now, before its body is read.

        Args:
            client: client that sends the request.

        Raises:
            NotReady: the models are still loading, or the server is broken.
            Overloaded: the queue is full.
        """
        self.ready_engine().reserve(1, client=client).release()

    def hosts(self, name: str) -> bool:
        """Whether a model has this name; safe from any thread.

        Raises:
            NotReady: the models are still loading.
        """
        return self.ready_shelf().hosts(name)

    def model_states(self) -> tuple[ModelState, ...]:
        """States of all models, the default one first; empty until the server has loaded."""
        return () if self._shelf is None else self._shelf.states()

    def models(self) -> tuple[ModelEntry, ...]:
        """The catalog's entry for each loaded model."""
        return tuple(
            ModelEntry(
                name=model.facts.name,
                revision=model.facts.revision,
                width=model.facts.default_width,
                height=model.facts.default_height,
                size_multiple=model.facts.size_multiple,
                longest_side=model.facts.longest_side,
                max_tokens=model.facts.max_tokens,
                vae=model.facts.vae,
                tiny_vae=model.facts.tiny_vae,
                denoiser=model.facts.given_denoiser,
                clip_skips=tuple(model.facts.clip_skips),
                prompt_syntaxes=("automatic1111",) if model.weighs_prompts else (),
                statistics=model.statistics.available,
                classifier={} if model.classifier is None else model.classifier.heads,
                adapters=adapter_entries(model),
                controls=control_entries(model),
                embeddings=embedding_entries(model),
                unfit_embeddings=dict(model.embeddings.unfit()),
                image_prompts=image_prompt_entries(model),
                reference_images=max_reference_images(model.facts),
                defaults=defaults_of(model.facts.defaults),
            )
            for model in (() if self._shelf is None else self._shelf.loaded())
        )

    async def check(self, request: GenerateRequest) -> None:
        """Refuse a request that could never be served, as far as that can be determined at once.

        Checks that need a model which is not loaded, or the size of an uploaded image, are left to
        :meth:`admit`.

        Raises:
            InvalidRequest: a field has an invalid value.
            UnknownModel: no such model is hosted.
            NotReady: the models are still loading, or the server is about to stop or broken.
        """
        self.ready_engine()
        shelf = self.ready_shelf()
        await shelf.check(request.model)
        check_count(request, self._limits)
        model = shelf.if_loaded(request.model)
        if model is None:
            return
        size = None
        if request.image is not None or request.reference_images:
            if request.width is None or request.height is None:
                check_references(len(request.reference_images), model.facts)
                return
            size = None if request.image is None else (request.width, request.height)
        await asyncio.to_thread(self.planner.prepare, request, model, size)

    async def admit(
        self, request: GenerateRequest, identifier: str, client: Client = ANONYMOUS
    ) -> Generation:
        """Check a request, fill in its defaults and submit it to the engine.

        The caller must :meth:`release` the generation in any case.

        Args:
            request: request as sent.
            identifier: identifier of the generation.
            client: client that sends the request.

        Raises:
            InvalidRequest: a field has an invalid value.
            UnknownModel: no such model is hosted.
            ModelMismatch: the model would have to be loaded, but cannot be.
            ModelTooLarge: the model does not fit in memory.
            DuplicateGeneration: the identifier is in use.
            Overloaded: the queue is full.
            NotReady: the models are still loading, or the server is about to stop or broken.
        """
        if identifier in self._under_way:
            raise DuplicateGeneration(identifier)
        generation = Generation(identifier, asyncio.get_running_loop(), self._line)
        self._under_way[identifier] = generation
        try:
            await generation.unless_ended(self._begin(generation, request, client))
        except BaseException as error:
            generation.end(error)
            self.release(generation)
            if isinstance(error, Exception):
                # A confirmed cancellation is the answer, whatever else went wrong.
                generation.check()
            raise
        return generation

    async def pictures(self, generation: Generation) -> Pictures:
        """Follow a generation to its end, and encode its images.

        Raises:
            WeftError: an image failed, or the generation was cancelled.
        """
        while not generation.done:
            await generation.news()
        return await pictures_of(generation, self._leases[generation].model)

    async def encoded(
        self, generation: Generation, pixels: Mapping[int, NDArray[np.uint8]]
    ) -> tuple[Picture, ...]:
        """Encode pixels as images of a generation, with the settings that make them.

        Args:
            generation: admitted generation.
            pixels: uint8 `[H, W, 3]` of each image by its index.
        """
        return await encoded(generation, self._leases[generation].model, pixels)

    def cancel(self, identifier: str) -> None:
        """Stop a generation; its rows become free at the next tick.

        Raises:
            UnknownGeneration: no generation of that identifier is running; it may have just
                completed.
        """
        generation = self._under_way.get(identifier)
        if generation is None or not generation.cancel():
            raise UnknownGeneration(identifier)

    def release(self, generation: Generation) -> None:
        """Remove a generation, and stop any part of it that is still running."""
        if self._under_way.pop(generation.id, None) is None:
            return
        generation.close()
        if lease := self._leases.pop(generation, None):
            lease.release()
        self.outcomes[generation.outcome] += 1

    async def _begin(
        self, generation: Generation, request: GenerateRequest, client: Client
    ) -> None:
        engine, shelf = self.ready_engine(), self.ready_shelf()
        await shelf.check(request.model)
        check_count(request, self._limits)
        with ExitStack() as held:
            runs = runs_of(request)
            room = held.enter_context(engine.reserve(runs * request.n, client=client, runs=runs))
            lease = self._leases[generation] = await shelf.lend(request.model)
            model = lease.model
            request = as_edit(request, model.facts)
            early = await decode_for_size(request, model, self.decoding)
            sizes = early.size, early.reference_size
            prepared = await asyncio.to_thread(self.planner.prepare, request, model, *sizes)
            await asyncio.to_thread(_claim, engine, room, request, prepared[0], model)
            uploads = await decoded(request, prepared[0], model, early, self.decoding)
            loop = asyncio.get_running_loop()
            submit = partial(self._submit, generation, *prepared, model, uploads, room, loop)
            await self.with_weights(prepared[0].request, model, submit)
            if prepared[0].second is not None:
                # The second run returns its room by itself.
                held.pop_all()

    async def with_weights(
        self, request: ResolvedRequest, model: HostedModel, work: Callable[[], Result]
    ) -> Result:
        """Run work that loads the weights named by a request, in a thread.

        If some are not in memory, it runs in the thread in which all weights are loaded, so that no
        other work waits for it.

        Args:
            request: request that names them.
            model: model that has them.
            work: function that needs them.
        """
        ready = await asyncio.to_thread(_weights_loaded, request, model)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None if ready else self._weights, work)

    def _submit(
        self,
        generation: Generation,
        prepared: Prepared,
        fitted_to: StatisticsIdentity | None,
        model: HostedModel,
        uploads: Uploads,
        room: Reservation,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        tasks, hires = _tasks(prepared, model, uploads), prepared.request.hires
        if prepared.second is None or hires is None:
            submission = room.submit(tasks, generation)
        else:
            again = _tasks_again(prepared.second, tasks[0], model, uploads)
            with naming_hires():
                self.ready_engine().check_memory(again)
            enlarge = started_from(hires.upscaler, model)
            submission = SecondRun(generation, loop, room, tasks[0], again, enlarge)
            submission.submit(tasks)
        statistics = fitted_to and guidance_name(fitted_to.rule, fitted_to.scale)
        generation.begin(
            prepared.request,
            model.facts.revision,
            statistics,
            prepared.warnings,
            prepared.notes,
            submission,
        )

    def _farewell(self) -> NotReady:
        """The error that says why requests are no longer served."""
        if self.broken:
            return NotReady(self.broken, retry_after_s=60)
        return NotReady("The server is stopping; send the request again in a few seconds.")

    def ready_shelf(self) -> ModelShelf:
        """Return the models, which are lent to their users.

        Raises:
            NotReady: they are still loading.
        """
        if self._shelf is None:
            raise NotReady("The model is still loading.")
        return self._shelf


def _weights_loaded(request: ResolvedRequest, model: HostedModel) -> bool:
    """Whether the adapters, ControlNets, embeddings and IP-Adapters of a request are in memory."""
    texts = [text for _, text in texts_of(request, model)]
    return (
        all(model.adapters.is_loaded(one.name) for one in request.adapters if one.weight)
        and all(model.controls.is_loaded(one.name) for one in request.controls if one.scale)
        and all(model.embeddings.is_loaded(one.name) for one in model.embeddings.named_in(*texts))
        and all(
            model.image_prompts.is_loaded(one.name) for one in request.image_prompts if one.scale
        )
    )


def _tasks(prepared: Prepared, model: HostedModel, uploads: Uploads) -> list[ImageTask]:
    image, kept, mask, reference, controls, *_, references = uploads
    request = prepared.request
    return tasks_of(
        prepared,
        model,
        image=None if image is None else pixels_tensor(image),
        kept=None if kept is None else pixels_tensor(kept),
        mask=None if mask is None else mask_tensor(mask),
        reference=None if reference is None else pixels_tensor(reference),
        controls=load_controls(request.controls, [*map(pixels_tensor, controls)], model),
        image_prompts=image_prompt_uses(request, uploads, model),
        references=tuple(map(pixels_tensor, references.read)),
        seen=tuple(map(SeenPicture.of, references.seen)),
    )


def _tasks_again(
    second: Prepared, first: ImageTask, model: HostedModel, uploads: Uploads
) -> list[ImageTask]:
    """Tasks of the second run, without what they start from."""
    pictures = list(map(pixels_tensor, uploads.controls_again))
    controls = load_controls(second.request.controls, pictures, model)
    return tasks_of(
        second,
        model,
        adapters=first.adapters,
        embeddings=first.text.embeddings,
        controls=controls,
        image_prompts=rescale_regions(first.image_prompts, second.request, uploads),
        references=first.references,
        seen=first.text.pictures,
    )


def _claim(
    engine: Engine,
    room: Reservation,
    request: GenerateRequest,
    prepared: Prepared,
    model: HostedModel,
) -> None:
    """Claim the cost of a request before its images are decoded, whose sizes are known."""
    width, height = prepared.request.width, prepared.request.height
    size = height, width
    picture, mask = (torch.empty(*shape, device="meta") for shape in ((3, *size), size))
    references = tuple(
        torch.empty(3, *largest_of(model.facts), device="meta") for _ in request.reference_images
    )
    tasks = tasks_of(
        prepared,
        model,
        image=None if request.image is None else picture,
        kept=picture.clone() if prepared.request.mask_content == "fill" else None,
        mask=None if request.mask is None else mask,
        reference=None if request.reference is None else picture.clone(),
        adapters=(),
        embeddings=(),
        controls=unloaded_controls(prepared.request.controls, picture, model),
        image_prompts=unloaded_image_prompts(request.image_prompts, width, height, model),
        references=references,
    )
    # Sizes of reference images are not known yet; they are checked with the tasks.
    engine.check_memory([replace(task, references=()) for task in tasks])
    if prepared.second is not None:
        width, height = prepared.second.request.width, prepared.second.request.height
        larger = torch.empty(3, height, width, device="meta")
        again = tasks_of(
            prepared.second,
            model,
            image=larger,
            adapters=(),
            embeddings=(),
            controls=unloaded_controls(prepared.second.request.controls, larger, model),
            image_prompts=unloaded_image_prompts(request.image_prompts, width, height, model),
            references=references,
        )
        with naming_hires():
            engine.check_memory([replace(task, references=()) for task in again])
        tasks += again
    room.claim(tasks)

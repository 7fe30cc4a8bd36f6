"""Response bodies in AUTOMATIC1111's format."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, Field

from server.http.automatic1111.jobs import ClientJob
from server.image_codec import encode
from server.requests.automatic1111 import Translated, Txt2Img
from server.service.generation import Generation
from server.service.pictures import Picture

__all__ = ["GenerationAnswer", "ProgressAnswer", "answered", "idle", "progress_of"]


class GenerationAnswer(BaseModel):
    """The images of a request."""

    images: list[str] = Field(description="Image files in base64.")
    parameters: dict[str, Any] = Field(description="The request as it was read, without images.")
    info: str = Field(description="JSON: seeds, settings, and the text of each image.")


class State(BaseModel):
    """The state of a job."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = Field(default=0, description="Images of the job; 0 if there is none.")
    job_timestamp: str = "0"
    job_no: int = Field(default=0, description="Finished images of the job.")
    sampling_step: int = 0
    sampling_steps: int = 0


class ProgressAnswer(BaseModel):
    """The progress of a client's oldest job."""

    progress: float = Field(default=0.0, description="From 0 to 1; 0 if there is no job.")
    eta_relative: float = Field(default=0.0, description="Estimated seconds left; 0 while unknown.")
    state: State = State()
    current_image: str | None = Field(default=None, description="A preview, PNG in base64.")
    textinfo: str | None = Field(
        default=None, description="How many requests are ahead of it, as text."
    )


MIN_PROGRESS: float = 0.01
"""Minimum progress of a job: 0 would mean that there is no job."""


def idle() -> ProgressAnswer:
    """Return the progress if there is no job."""
    return ProgressAnswer()


def progress_of(jobs: Sequence[ClientJob], *, with_image: bool) -> ProgressAnswer:
    """Return the progress of the oldest job.

    Args:
        jobs: jobs of one client, at least one, the oldest first.
        with_image: whether to include a preview.
    """
    job = jobs[0]
    preview = job.preview if with_image else None
    seen = job.seen
    return ProgressAnswer(
        progress=max(MIN_PROGRESS, job.share),
        eta_relative=job.left_s,
        state=State(
            interrupted=job.interrupted,
            job=f"{len(jobs)} running",
            job_count=job.images,
            job_no=sum(one.step == one.steps for one in seen),
            sampling_step=min((one.step for one in seen), default=0),
            sampling_steps=job.steps,
        ),
        current_image=None
        if preview is None
        else base64.b64encode(encode(preview, "png")).decode(),
        textinfo=_of_the_queue(job.queue_position),
    )


def _of_the_queue(position: int | None) -> str | None:
    """Return the text that clients show while a job waits."""
    if not position:
        return None
    requests = "request is" if position == 1 else "requests are"
    return f"Waiting: {position} {requests} ahead of this one."


def answered(
    body: Txt2Img,
    wanted: Translated,
    generation: Generation,
    pictures: Sequence[Picture],
) -> GenerationAnswer:
    """Return the response with images.

    Args:
        body: request as sent.
        wanted: request in Weft's own format.
        generation: generation that made the images, or some of them.
        pictures: images.
    """
    return GenerationAnswer(
        images=[base64.b64encode(picture.data).decode() for picture in pictures]
        if body.send_images
        else [],
        parameters=parameters_of(body),
        info=json.dumps(_info(body, wanted, generation, pictures)),
    )


def parameters_of(body: Txt2Img) -> dict[str, Any]:
    """Return the request as it was read, without images."""
    images = {
        "init_images": True,
        "mask": True,
        "controlnet": {"__all__": {"image", "effective_region_mask"}},
    }
    return body.model_dump(mode="json", exclude={**images, "infotext": True})


def _info(
    body: Txt2Img, wanted: Translated, generation: Generation, pictures: Sequence[Picture]
) -> dict[str, Any]:
    request = generation.request
    count = len(pictures)
    seeds = [picture.seed for picture in pictures]
    variation, noise_size = request.variation, request.noise_size
    subseed = request.seed if variation is None else variation.seed or 0
    scale = getattr(request.guidance, "scale", 1.0)
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * count,
        "negative_prompt": body.negative_prompt,
        "all_negative_prompts": [body.negative_prompt] * count,
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": subseed,
        "all_subseeds": [subseed + index for index in range(count)],
        "subseed_strength": 0 if variation is None else variation.strength,
        "width": request.width,
        "height": request.height,
        "sampler_name": wanted.sampler_name or request.sampler.name,
        "cfg_scale": scale,
        "steps": request.steps,
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": request.model,
        "sd_model_hash": generation.model_revision[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1 if noise_size is None else noise_size.width,
        "seed_resize_from_h": -1 if noise_size is None else noise_size.height,
        "denoising_strength": request.strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [picture.text for picture in pictures],
        "styles": list(body.styles),
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(generation.created)),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"weft {version('weft')}",
        "settings": request.settings(),
        "warnings": [*wanted.ignored, *generation.warnings],
        "notes": list(generation.notes),
    }

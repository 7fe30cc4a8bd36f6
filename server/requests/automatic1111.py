"""Translation of AUTOMATIC1111's image requests into Weft's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ConfigDict, Field, ValidationError, model_validator
from typing_extensions import override

from samplers import FittedSampler, Sampler, Spacing
from server.decoding.picture import MaskForm
from server.errors import InvalidRequest
from server.models.embeddings.naming import named
from server.models.emphasis import is_long, is_weighted
from server.requests.automatic1111_controlnet import ControlNetUnit, translate_units
from server.requests.automatic1111_hires import (
    MIN_STEPS,
    HiresFields,
    different,
    hires,
    written,
)
from server.requests.automatic1111_names import sampler_and_spacing
from server.requests.conjunction import composed_of, split_prompt
from server.requests.foreign_names import fields_of
from server.requests.infotext import CHURN
from server.requests.lora_tags import read_tags
from server.requests.messages import explain
from server.requests.read_infotext import read_infotext
from server.requests.reading import RESIZE_MODES, Reading
from server.requests.schema import DEFAULT_STEPS, GenerateRequest, MaskContent
from server.requests.start_noise import MAX_SEED
from server.requests.upload import Upload

__all__ = ["Img2Img", "Translated", "Txt2Img", "translated"]

_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "styles": ((),),
    "restore_faces": (False,),
    "tiling": (False,),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (1,),
    "refiner_checkpoint": ("", "None"),
    "script_name": ("", "None"),
    "scripts": ((),),
    "resize_mode": tuple(range(len(RESIZE_MODES))),
    "initial_noise_multiplier": (1,),
}
"""Fields without an equivalent here, and their neutral values."""

_CHURN: Final = tuple(CHURN.values())
"""Fields that take effect with a sampler that has churn."""

_OF_PICTURES: Final = {"enable_hr": (False,)}
"""Fields without an equivalent in requests that start from an image, and their neutral values."""

_SETTINGS: Final = {"sd_vae": "Automatic"}
"""Neutral values of `override_settings`."""

_CLIP_SKIP: Final = "CLIP_stop_at_last_layers"
"""AUTOMATIC1111's name for the setting behind "Clip skip"."""

MASK_CONTENTS: Final[tuple[MaskContent, ...]] = (
    "fill",
    "original",
    "latent_noise",
    "latent_nothing",
)
"""Meanings of the values of `inpainting_fill`, from 0."""

_OF_INFOTEXT: Final[Mapping[str, str]] = {
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "steps": "Steps",
    "sampler_name": "Sampler",
    "scheduler": "Schedule type",
    "cfg_scale": "CFG scale",
    "seed": "Seed",
    "subseed": "Variation seed",
    "subseed_strength": "Variation seed strength",
    "seed_resize_from_w": "Seed resize from-1",
    "seed_resize_from_h": "Seed resize from-2",
    "width": "Size-1",
    "height": "Size-2",
    "denoising_strength": "Denoising strength",
    "clip_skip": "Clip skip",
    **{field: label for label, field in CHURN.items()},
}


class Txt2Img(HiresFields):
    """A request of AUTOMATIC1111's `POST /sdapi/v1/txt2img`; unknown fields are ignored.

    Fields without a description have no effect. Those that would change the image are listed in
    `warnings` of the response's `info`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    prompt: str = Field(
        default="", description="Describes the image; `<lora:name:weight>` chooses an adapter."
    )
    negative_prompt: str = Field(default="", description="Describes what to steer away from.")
    seed: int = Field(default=-1, description="Seed of the first image; -1 is a random one.")
    subseed: int = Field(
        default=-1, description="Variation seed of the first image; -1 is a random one."
    )
    subseed_strength: float = Field(
        default=0,
        ge=0,
        le=1,
        description="How far the start noise is rotated towards that of the variation seed.",
    )
    seed_resize_from_w: int = Field(
        default=-1,
        le=16384,
        description="Width of a picture whose start noise is used in the middle; needs the height.",
    )
    seed_resize_from_h: int = Field(default=-1, le=16384, description="Height of that picture.")
    sampler_name: str | None = Field(
        default=None,
        max_length=128,
        description="Name of a sampler in AUTOMATIC1111 or on this server.",
    )
    sampler_index: str | None = Field(
        default=None, max_length=128, description="Another name for `sampler_name`."
    )
    scheduler: str | None = Field(
        default=None,
        max_length=128,
        description="Schedule type; `Automatic` is the sampler's own.",
    )
    steps: int | None = Field(default=None, description="Default: the model's own.")
    cfg_scale: float | None = Field(
        default=None,
        ge=0,
        description="Scale of classifier-free guidance; values up to 1 turn it off. Default: the "
        "model's own guidance.",
    )
    distilled_cfg_scale: float | None = Field(
        default=None,
        ge=1,
        le=20,
        description="Forge's field: guidance scale that a distilled model takes as an input.",
    )
    width: int | None = Field(default=None, ge=1, description="Default: the model's own.")
    height: int | None = Field(default=None, ge=1, description="Default: the model's own.")
    batch_size: int = Field(
        default=1, ge=1, le=1024, description="Multiplied by `n_iter`, the number of images."
    )
    n_iter: int = Field(
        default=1, ge=1, le=1024, description="Multiplied by `batch_size`, the number of images."
    )
    eta: float | None = Field(
        default=None,
        description="Amount of fresh noise, for samplers that add noise and for DDIM; 0 to 1.",
    )
    denoising_strength: float | None = Field(
        default=None, ge=0, le=1, description="Share of the steps that are run from an image."
    )
    override_settings: dict[str, Any] = Field(
        default={},
        description="`sd_model_checkpoint` names the model, `CLIP_stop_at_last_layers` is "
        "`clip_skip`.",
    )
    clip_skip: int = Field(
        default=1,
        description="Layer of the text encoders that the model reads, counted from the last; 0 and "
        "1 are the model's own.",
    )
    send_images: bool = Field(default=True, description="Whether the response contains the images.")
    infotext: str | None = Field(
        default=None, description="Infotext of an image, which sets the fields that are left out."
    )
    styles: tuple[str, ...] = ()
    restore_faces: bool = False
    tiling: bool = False
    s_churn: float = Field(
        default=0, description="Fresh noise that Euler, Heun and DPM2 add over the whole run."
    )
    s_tmin: float = Field(default=0, description="Lowest sigma at which they add it.")
    s_tmax: float = Field(
        default=0, description="Highest sigma at which they add it; 0 is no limit."
    )
    s_noise: float = Field(default=1, description="Factor on the noise that they add.")
    refiner_checkpoint: str = ""
    script_name: str = ""
    scripts: tuple[str, ...] = Field(default=(), description="Names in `alwayson_scripts`.")
    controlnet: tuple[ControlNetUnit, ...] = Field(
        default=(), description="Units in `alwayson_scripts`."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Drop fields that are null, and take missing fields from the infotext."""
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        if isinstance(text := given.get("infotext"), str):
            found = read_infotext(text)
            of_text = {ours: found[name] for ours, name in _OF_INFOTEXT.items() if found.get(name)}
            given = of_text | written(found) | given
        return given

    def picture(self) -> dict[str, Any]:
        """Return the fields of Weft's request about the image to start from."""
        return {}

    @property
    def padding(self) -> int | None:
        """Pixels around the mask, if only its region is drawn; otherwise None."""
        return None


class Img2Img(Txt2Img):
    """A request of AUTOMATIC1111's `POST /sdapi/v1/img2img`; unknown fields are ignored."""

    init_images: Upload = Field(
        repr=False, description="A list with the image to start from, in base64."
    )
    mask: Upload | None = Field(
        default=None,
        repr=False,
        description="White, or opaque if it has transparency, where the image is repainted.",
    )
    mask_blur: float = Field(
        default=4, ge=0, le=512, description="Blur radius of the mask in pixels."
    )
    mask_blur_x: float | None = Field(default=None, ge=0, le=512)
    mask_blur_y: float | None = Field(default=None, ge=0, le=512)
    inpainting_mask_invert: bool = Field(
        default=False, description="Repaint what the mask keeps, and keep the rest."
    )
    include_init_images: bool = Field(
        default=False,
        description="Whether `parameters` of the response has the images that were sent.",
    )
    denoising_strength: float | None = Field(
        default=0.75, ge=0, le=1, description="Share of the steps that are run."
    )
    resize_mode: int = Field(
        default=0, description="0 stretches the image, 1 crops it, 2 fits it in and fills the rest."
    )
    inpainting_fill: int = Field(
        default=0,
        ge=0,
        le=3,
        description="What the repainted part starts from: 0 the colours around it, 1 the image, 2 "
        "noise, 3 nothing.",
    )
    inpaint_full_res: bool = Field(
        default=True,
        description="With a mask: whether only the region around it is drawn, at `width` x "
        "`height`, and put back into the image, which keeps its own size.",
    )
    inpaint_full_res_padding: int = Field(
        default=0, ge=0, le=4096, description="Padding of that region around the mask, in pixels."
    )
    initial_noise_multiplier: float = 1

    @property
    @override
    def padding(self) -> int | None:
        whole = self.mask is None or not self.inpaint_full_res
        return None if whole else self.inpaint_full_res_padding

    @override
    def picture(self) -> dict[str, Any]:
        strength = 0.75 if self.denoising_strength is None else self.denoising_strength
        image: dict[str, Any] = {
            "image": self.init_images,
            "strength": min(1.0, max(strength, MIN_STEPS / (self.steps or DEFAULT_STEPS))),
            # Mode 3 stretches the latent.
            "resize_mode": dict(enumerate(RESIZE_MODES)).get(self.resize_mode, "stretch"),
        }
        if self.mask is None:
            return image
        across, down = self.mask_blur_x, self.mask_blur_y
        blur = (
            self.mask_blur if across is None else across,
            self.mask_blur if down is None else down,
        )
        form = MaskForm("opaque", inverted=self.inpainting_mask_invert, blur=blur)
        content = MASK_CONTENTS[self.inpainting_fill]
        return image | {"mask": self.mask.as_mask(form), "mask_content": content}


@dataclass(frozen=True, slots=True)
class Translated:
    """A translated request, with data for its response.

    Attributes:
        request: request in Weft's own format.
        sampler_name: sampler name as sent; empty for the model's own.
        size: width and height that are drawn.
        padding: pixels around the mask, if only its region is drawn.
        ignored: one sentence that lists what has no effect, if anything.
    """

    request: GenerateRequest
    sampler_name: str
    size: tuple[int, int]
    padding: int | None
    ignored: tuple[str, ...]


def translated(
    body: Txt2Img,
    model: str | None,
    adapters: Collection[str] | None,
    multiple: int,
    size: tuple[int, int],
    embeddings: Collection[str] | None = (),
    controls: Collection[str] | None = (),
    image_prompts: Collection[str] | None = (),
) -> Translated:
    """Translate a request of AUTOMATIC1111 into Weft's own format.

    Args:
        body: request as sent.
        model: name of the model chosen by its settings; None for the default.
        adapters: names of the model's adapters; None if the model is not loaded yet.
        multiple: multiple of pixels that the model needs for width and height; sizes are rounded
            down to it, as in AUTOMATIC1111.
        size: default width and height of the model.
        embeddings: names of the model's embeddings; None if the model is not loaded yet.
        controls: names of the model's ControlNets; None if the model is not loaded yet.
        image_prompts: names of the model's IP-Adapters; None if the model is not loaded yet.

    Raises:
        InvalidRequest: a value is invalid.
    """
    tags, negative = read_tags(body.prompt), read_tags(body.negative_prompt)
    parts = split_prompt(tags.prompt)
    loras = {
        name: weight for name, weight in tags.loras.items() if adapters is None or name in adapters
    }
    sampler_name = body.sampler_name or body.sampler_index or ""
    sampler, spacing = _chosen(sampler_name, body.scheduler)
    width, height = _side(body.width, multiple), _side(body.height, multiple)
    drawn = width or size[0], height or size[1]
    picture = body.picture()
    start = picture.get("image"), picture.get("resize_mode")
    acting = {"cuts": body.padding is not None, "enlarges": _enlarges(body)}
    steered = translate_units(body.controlnet, *start, controls, image_prompts, **acting)
    given: dict[str, Any] = {
        "prompt": tags.prompt,
        "negative_prompt": negative.prompt or None,
        "prompt_syntax": _syntax((tags.prompt, negative.prompt), embeddings),
        "clip_skip": _clip_skip(body),
        "model": model,
        "width": width,
        "height": height,
        "steps": body.steps,
        "seed": None if body.seed < 0 else body.seed % MAX_SEED,
        **_start_noise(body, multiple),
        "n": body.batch_size * body.n_iter,
        "adapters": [{"name": name, "weight": weight} for name, weight in loras.items()],
        # For the previews of `GET /sdapi/v1/progress` and for the images after an interruption.
        "stream": True,
        **_sampler(body, sampler, spacing),
        **(composed_of(parts, body.cfg_scale) if len(parts) > 1 else _guidance(body)),
        **picture,
        **_second_run(body, drawn, multiple),
        **steered.fields,
    }
    try:
        request = GenerateRequest.model_validate(given)
    except ValidationError as error:
        raise explain(error.errors(), GenerateRequest) from None
    ignored = [*_without_effect(body, sampler), *steered.ignored]
    ignored += [*tags.others, *negative.others]
    ignored += [f"<lora:{name}>" for name in (tags.loras.keys() - loras.keys())]
    said = (
        [f"Ignored, because there is no equivalent here: {', '.join(ignored)}."] if ignored else []
    )
    composes = len(parts) > 1
    reading = Reading(habitual=True, composes=composes, distilled_scale=body.distilled_cfg_scale)
    return Translated(
        request.read_as(reading),
        sampler_name,
        drawn,
        body.padding,
        tuple(said),
    )


def _second_run(body: Txt2Img, size: tuple[int, int], multiple: int) -> dict[str, Any]:
    """Return the field `hires`, for requests that start from noise, as in AUTOMATIC1111."""
    if not _enlarges(body):
        return {}
    return hires(body, size, body.steps, body.denoising_strength, multiple)


def _enlarges(body: Txt2Img) -> bool:
    return body.enable_hr and not isinstance(body, Img2Img)


def _syntax(texts: Sequence[str], embeddings: Collection[str] | None) -> str | None:
    """Return the prompt syntax, if prompts may be more than plain text of one chunk."""
    if embeddings is None or any(is_weighted(text) or is_long(text) for text in texts):
        return "automatic1111"
    # The name of an embedding, even a short one, may stand for many vectors.
    return "automatic1111" if any(named(text, embeddings) for text in texts) else None


def _clip_skip(body: Txt2Img) -> int | None:
    """Return the requested layer; None for the model's own, which is 1 there for every model."""
    skip = body.override_settings.get(_CLIP_SKIP) or body.clip_skip
    return None if skip in (0, 1) else skip


def _start_noise(body: Txt2Img, multiple: int) -> dict[str, Any]:
    """Return the fields `variation` and `noise_size`."""
    fields: dict[str, Any] = {}
    if body.subseed_strength:
        seed = None if body.subseed < 0 else body.subseed % MAX_SEED
        fields["variation"] = {"seed": seed, "strength": body.subseed_strength}
    width, height = body.seed_resize_from_w, body.seed_resize_from_h
    if width > 0 and height > 0:
        size = {"width": _side(width, multiple), "height": _side(height, multiple)}
        fields["noise_size"] = size
    return fields


def _side(pixels: int | None, multiple: int) -> int | None:
    return None if pixels is None else max(pixels - pixels % multiple, multiple)


def _chosen(name: str, schedule: str | None) -> tuple[Sampler | None, Spacing | None]:
    """Return the named sampler and spacing; None for the model's own.

    Raises:
        InvalidRequest: the sampler or schedule type is unknown or unsupported.
    """
    if not name:
        return None, None
    try:
        return sampler_and_spacing(name, schedule)
    except ValueError as unknown:
        raise InvalidRequest("sampler_name", str(unknown)) from None


def _sampler(body: Txt2Img, sampler: Sampler | None, spacing: Spacing | None) -> dict[str, Any]:
    """Return the fields `sampler` and `spacing`."""
    if sampler is None:
        return {}
    fields = fields_of(sampler)
    if isinstance(sampler, FittedSampler):
        # Clients can send only the name, and statistics exist for few guidance scales.
        fields["statistics"] = "nearest"
    if body.eta is not None and _takes_eta(sampler):
        fields["eta"] = body.eta
    if body.s_churn and _takes_churn(sampler):
        churn = {name: getattr(body, name) for name in _CHURN}
        fields |= churn | {"s_tmax": body.s_tmax or None}
    return {"sampler": fields} | ({} if spacing is None else {"spacing": fields_of(spacing)})


def _takes_eta(sampler: Sampler) -> bool:
    """Return whether AUTOMATIC1111's sampler takes eta: those that add noise, and DDIM."""
    return sampler.name == "ddim" or getattr(sampler, "eta", 0) > 0


def _takes_churn(sampler: Sampler | None) -> bool:
    """Return whether AUTOMATIC1111's sampler has churn: Euler, Heun and DPM2, but not "DPM2 a"."""
    return hasattr(sampler, "s_churn") and not getattr(sampler, "eta", 0)


def _guidance(body: Txt2Img) -> dict[str, Any]:
    """Return the field `guidance`, for models that are not distilled for guidance of their own."""
    if body.cfg_scale is None:
        return {}
    scale = body.cfg_scale
    return {"guidance": {"name": "cfg", "scale": scale} if scale > 1 else "none"}


def _without_effect(body: Txt2Img, sampler: Sampler | None) -> list[str]:
    """Return the names of set fields that have no equivalent here."""
    acting = _CHURN if _takes_churn(sampler) else ()
    names = [
        name
        for name, neutral in _NEUTRAL.items()
        if name not in acting and getattr(body, name, neutral[0]) not in neutral
    ]
    if isinstance(body, Img2Img):
        names += [
            name for name, neutral in _OF_PICTURES.items() if getattr(body, name) not in neutral
        ]
    elif body.enable_hr:
        names += different(body)
    asked = {
        name
        for name, value in body.override_settings.items()
        if value and value != _SETTINGS.get(name)
    } - {"sd_model_checkpoint", _CLIP_SKIP}
    return names + [f"override_settings.{name[:60]}" for name in sorted(asked)]

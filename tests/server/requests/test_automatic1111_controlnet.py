"""Units of AUTOMATIC1111's ControlNet extension, translated to our requests."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.errors import InvalidRequest
from server.requests.automatic1111 import Img2Img, Translated, Txt2Img, translated
from server.requests.automatic1111_controlnet import units_in
from server.requests.messages import explain
from server.requests.upload import Upload

PICTURE = "aGVsbG8="
UNIT: dict[str, Any] = {"image": PICTURE, "model": "depth"}


def scripts(*units: Any) -> dict[str, Any]:
    return {"ControlNet": {"args": list(units)}}


def read(*units: Any, controls: tuple[str, ...] | None = ("depth",), **fields: Any) -> Translated:
    kind = Img2Img if "init_images" in fields else Txt2Img
    body = kind.model_validate({**fields, "controlnet": units_in(scripts(*units))})
    prompts = None if controls is None else ("style",)
    return translated(body, None, (), 32, (64, 64), (), controls, prompts)


def held(upload: Upload) -> str | bytes:
    with upload.opened() as data:
        return data


def test_a_unit_is_a_control_of_the_same_name_weight_and_window() -> None:
    named = {"model": "Depth [0a1b2c3d]", "weight": 0.6, "guidance_start": 0.1, "guidance": 0.8}
    unit = {"input_image": {"image": PICTURE, "mask": None}, "resize_mode": 2, "pixel_perfect": 1}
    [control] = read(named | unit | {"module": "invert", "threshold_a": 64}).request.controls
    assert control.settings.model_dump() == {
        "name": "depth",
        "scale": 0.6,
        "start": 0.1,
        "end": 0.8,
        "resize_mode": "fill",
        "preprocessor": "invert",
        "precedence": None,
    }
    assert held(control.image) == PICTURE


@pytest.mark.parametrize("module", ["none", "ip-adapter-auto", "CLIP-ViT-H (IPAdapter)"])
def test_a_unit_of_an_ip_adapter_is_an_image_prompt(module: str) -> None:
    style = {"model": "style", "module": module, "weight": 0.5, "effective_region_mask": "bWFzaw=="}
    found = read(UNIT, UNIT | style)
    assert [one.name for one in found.request.controls] == ["depth"]
    [prompt] = found.request.image_prompts
    assert (prompt.name, prompt.scale) == ("style", 0.5)
    assert prompt.mask is not None
    assert held(prompt.mask) == "bWFzaw=="
    assert not found.ignored


def test_of_a_model_that_is_not_loaded_the_preprocessor_tells_the_kind() -> None:
    prompt = {"model": "faces [aa]", "module": "ip-adapter_clip_sd15"}
    request = read(UNIT | {"model": "edges [bb]"}, UNIT | prompt, controls=None).request
    assert [one.name for one in request.controls] == ["edges"]
    assert [one.name for one in request.image_prompts] == ["faces"]


@pytest.mark.parametrize(
    ("mode", "precedence"),
    [
        ("Balanced", None),
        ("My prompt is more important", "prompt"),
        (1, "prompt"),
        ("ControlNet is more important", "control"),
        ("2", "control"),
    ],
)
def test_a_control_mode_says_what_counts_for_more(mode: str | int, precedence: str | None) -> None:
    [control] = read(UNIT | {"control_mode": mode}).request.controls
    assert control.precedence == precedence


def test_units_that_are_switched_off_and_what_is_no_unit_are_left_out() -> None:
    assert units_in(None) == units_in({"ADetailer": {"args": [True]}}) == []
    off = UNIT | {"enabled": False}, UNIT | {"enabled": "false"}
    sent = scripts(*off, {}, "none", None, UNIT | {"enabled": "true"})
    assert [one["model"] for one in units_in(sent)] == ["depth"]
    assert units_in({"controlnet": {"args": []}}) == []


def test_an_earlier_name_that_is_null_says_nothing() -> None:
    given = {"guidance_end": 0.5, "guidance": None, "input_image": None}
    [control] = read(UNIT | given).request.controls
    assert control.end == 0.5


def test_without_an_image_a_unit_reads_the_one_to_start_from() -> None:
    unit = {"model": "depth", "image": ""}
    request = read(unit, init_images="c3RhcnQ=", resize_mode=2).request
    [control] = request.controls
    assert request.image is not None
    assert held(control.image) == held(request.image) == "c3RhcnQ="
    assert control.resize_mode == request.resize_mode == "fill"


@pytest.mark.parametrize(
    ("unit", "field", "says"),
    [
        (
            {"module": "canny"},
            "controlnet.0.module",
            "controlnet.0.module is 'canny'; allowed are: none, invert, ip-adapter-auto. For "
            "another preprocessor, send a picture that was prepared with it, and the module none.",
        ),
        (
            {"model": "pose [00]"},
            "controlnet.0.model",
            "controlnet.0.model is 'pose [00]'; allowed with this module are: depth, style.",
        ),
        (
            {"module": "ip-adapter-auto"},
            "controlnet.0.model",
            "controlnet.0.model is 'depth'; allowed with this module are: style.",
        ),
        ({"image": None}, "controlnet.0.image", "controlnet.0.image is required."),
        (
            {"image": [{"image": PICTURE}, {"image": PICTURE}]},
            "controlnet.0.image",
            "controlnet.0.image has 2 pictures; send a unit for each of them.",
        ),
    ],
)
def test_what_is_not_here_is_refused_by_its_field(
    unit: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(UNIT | unit)
    assert (refused.value.field, refused.value.message) == (field, says)


@pytest.mark.parametrize(
    ("unit", "says"),
    [
        ({"weight": 5}, "controlnet.0.weight is 5; it must be at most 4."),
        (
            {"guidance_start": 0.5, "guidance_end": 0.5},
            "controlnet.0: guidance_start is 0.5; it must be less than guidance_end, 0.5.",
        ),
        (
            {"control_mode": 3},
            "controlnet.0.control_mode: must be one of 'Balanced', 'My prompt is more important', "
            "'ControlNet is more important'.",
        ),
        (
            {"resize_mode": "Just"},
            "controlnet.0.resize_mode: must be one of 'Just Resize', 'Crop and Resize', 'Resize "
            "and Fill'.",
        ),
    ],
)
def test_what_is_no_unit_is_refused(unit: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        read(UNIT | unit)
    assert explain(refused.value.errors(), Txt2Img).message == says


def test_what_would_change_the_image_and_has_no_equal_is_named() -> None:
    unit = UNIT | {
        "image": [PICTURE, PICTURE],
        "effective_region_mask": PICTURE,
        "advanced_weighting": [0.5] * 13,
        "hr_option": "Low res only",
        "inpaint_crop_input_image": False,
    }
    names = ("mask", "effective_region_mask", "advanced_weighting")
    listed = ", ".join(f"controlnet.0.{name}" for name in names)
    assert read(unit).ignored == (f"Ignored, because there is no equivalent here: {listed}.",)
    [enlarged] = read(unit, enable_hr=True).ignored
    assert "controlnet.0.hr_option" in enlarged
    [cut] = read(unit, init_images=PICTURE, mask=PICTURE, inpaint_full_res=True).ignored
    assert "controlnet.0.inpaint_crop_input_image" in cut
    plain = {"control_mode": 0, "hr_option": "Both", "mask": None, "processor_res": 512}
    assert not read(UNIT | plain).ignored

"""Units of the ControlNet extension against a running server; `webuiapi` is not changed."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from webuiapi import ControlNetUnit, WebUIApi, WebUIApiResult

from tests.server.conftest import Running
from tests.server.models.controls.tiny_controls import put_depth
from tests.server.models.image_prompts.tiny_image_prompts import put_adapter, put_encoder

Generate = Callable[..., httpx2.Response]

SMALL: dict[str, Any] = {"prompt": "a red circle", "seed": 5, "width": 64, "height": 64, "steps": 2}
GUIDANCE = {"name": "cfg", "scale": 4}
OURS: dict[str, Any] = {"sampler": "euler", "spacing": "linspace", "guidance": GUIDANCE}
THEIRS: dict[str, Any] = SMALL | {"sampler_name": "Euler", "cfg_scale": 4}


@pytest.fixture(scope="module")
def api(running: Running, controls_folder: Path, image_prompts_folder: Path) -> Iterator[WebUIApi]:
    """A client of a server whose model has the ControlNet `depth` and the IP-Adapter `style`."""
    [model, *_] = running.app.state.service.ready_shelf().loaded()
    put_depth(model, controls_folder)
    put_encoder(image_prompts_folder)
    put_adapter(model.modules()["unet"], image_prompts_folder, "style", 1)
    host, port = running.address
    made = WebUIApi(host=host, port=port)
    yield made
    made.session.close()


def unit(**fields: Any) -> ControlNetUnit:
    return ControlNetUnit(**fields)


def own_scripts() -> dict[str, Any]:
    """Scripts of one call: the client keeps units in its default and would send them again."""
    return {"alwayson_scripts": {}}


def picture(seed: int, width: int = 56, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def b64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def pixels_of(answer: httpx2.Response) -> NDArray[np.uint8]:
    assert answer.status_code == 200, answer.text
    file = base64.b64decode(answer.json()["images"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(file)))


def drawn(result: Any) -> NDArray[np.uint8]:
    assert isinstance(result, WebUIApiResult)
    assert result.info["warnings"] == []
    return np.asarray(result.image)


def test_units_draw_the_image_of_the_native_request(api: WebUIApi, generate: Generate) -> None:
    edges, subject = picture(1), picture(2)
    weights: dict[str, Any] = {"weight": 0.7, "guidance_end": 0.5}
    units = [
        unit(image=edges, model="depth [0123abcd]", module="invert", control_mode=2, **weights),
        unit(image=subject, model="style", module="ip-adapter_clip_sd15", weight=0.5),
        unit(image=edges, model="depth", enabled=False),
    ]
    result = api.txt2img(**THEIRS, **own_scripts(), controlnet_units=units)
    how = {"scale": 0.7, "end": 0.5, "resize_mode": "fill", "preprocessor": "invert"}
    control = {"name": "depth", "image": b64(edges), "precedence": "control", **how}
    prompt = {"name": "style", "image": b64(subject), "scale": 0.5}
    steered = generate(**OURS, controls=[control], image_prompts=[prompt])
    assert (drawn(result) == pixels_of(steered)).all()
    assert (drawn(result) != pixels_of(generate(**OURS))).any()
    # The same without a preprocessor, from the inverted picture.
    inverted = Image.fromarray(255 - np.asarray(edges))
    plain = {"name": "depth", "scale": 0.7, "end": 0.5, "image": b64(inverted)}
    plain |= {"precedence": "control"}
    by_hand = generate(**OURS, controls=[plain], image_prompts=[prompt], resize_mode="fill")
    assert np.abs(pixels_of(by_hand).astype(int) - pixels_of(steered)).max() <= 1
    text = result.info["infotexts"][0] if isinstance(result, WebUIApiResult) else ""
    assert "Module: invert, Model: depth, Weight: 0.7" in text
    assert "Resize Mode: Resize and Fill, Control Mode: ControlNet is more important" in text


def test_a_unit_of_img2img_reads_the_image_to_start_from(api: WebUIApi, generate: Generate) -> None:
    start = picture(3)
    one = unit(model="depth")
    options: dict[str, Any] = {
        "denoising_strength": 0.5,
        "controlnet_units": [one],
        **own_scripts(),
    }
    result = api.img2img([start], **THEIRS, resize_mode=1, **options)
    beside = {"image": b64(start), "strength": 0.5, "resize_mode": "crop"}
    control = {"name": "depth", "image": b64(start)}
    assert (drawn(result) == pixels_of(generate(**OURS, **beside, controls=[control]))).all()


def test_of_the_region_around_a_mask_a_unit_reads_the_same_part(
    api: WebUIApi, generate: Generate
) -> None:
    start, edges, mask = picture(4, 96, 96), picture(5, 96, 96), Image.new("L", (96, 96))
    mask.paste(255, (32, 0, 96, 64))
    options: dict[str, Any] = {
        "mask_image": mask,
        "mask_blur": 0,
        "inpainting_fill": 1,
        "denoising_strength": 1,
    }
    one = unit(image=edges, model="depth")
    result = api.img2img([start], **THEIRS, **options, **own_scripts(), controlnet_units=[one])
    box = (32, 0, 96, 64)
    control = {"name": "depth", "image": b64(edges.crop(box))}
    whole = Image.new("L", (64, 64), 255)
    beside = {"image": b64(start.crop(box)), "mask": b64(whole), "controls": [control]}
    part = pixels_of(generate(**OURS, **beside))
    assert np.abs(drawn(result)[0:64, 32:96].astype(int) - part).max() <= 1


@pytest.mark.usefixtures("api")
def test_of_the_region_around_a_mask_an_ip_adapter_acts_where_it_does_in_the_whole(
    client: httpx2.Client, generate: Generate
) -> None:
    box, subject = (32, 0, 96, 64), picture(7)
    start, mask, left, right = picture(4, 96, 96), *(Image.new("L", (96, 96)) for _ in range(3))
    mask.paste(255, box)
    left.paste(255, (0, 0, 24, 96))
    right.paste(255, (64, 0, 96, 96))
    style = {"model": "style", "module": "ip-adapter-auto", "image": b64(subject)}
    # All of the first one lies beside the region.
    units = [style | {"effective_region_mask": b64(one)} for one in (left, right)]
    options: dict[str, Any] = {
        "init_images": [b64(start)],
        "mask": b64(mask),
        "mask_blur": 0,
        "inpainting_fill": 1,
        "denoising_strength": 1,
        "alwayson_scripts": {"controlnet": {"args": units}},
    }
    answer = client.post("/sdapi/v1/img2img", json=THEIRS | options)
    [text] = answer.json()["images"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    whole = Image.new("L", (64, 64), 255)
    beside = {"image": b64(start.crop(box)), "mask": b64(whole)}
    prompt = {"name": "style", "image": b64(subject), "mask": b64(right.crop(box))}
    part = pixels_of(generate(**OURS, **beside, image_prompts=[prompt]))
    assert np.abs(image[0:64, 32:96].astype(int) - part).max() <= 1


def test_what_is_no_object_of_scripts_is_refused(client: httpx2.Client) -> None:
    answer = client.post("/sdapi/v1/txt2img", json=SMALL | {"alwayson_scripts": [1]})
    assert answer.status_code == 422
    assert answer.json()["errors"] == "alwayson_scripts must be an object."


def test_the_extensions_routes_say_what_there_is(api: WebUIApi, client: httpx2.Client) -> None:
    assert api.get_scripts() == {"txt2img": ["controlnet"], "img2img": ["controlnet"]}
    assert api.controlnet_version() == 3
    # Other tests add theirs to the folders of the same server.
    assert {"depth", "style"} <= set(api.controlnet_model_list())
    assert api.controlnet_module_list() == ["none", "invert", "ip-adapter-auto"]
    assert client.get("/controlnet/settings").json() == {"control_net_unit_count": 4}
    [kind] = client.get("/controlnet/control_types").json()["control_types"].values()
    assert kind["model_list"][0] == kind["default_model"] == "None"


def test_a_picture_is_prepared(client: httpx2.Client) -> None:
    image = picture(6)
    body: dict[str, Any] = {"controlnet_input_images": [b64(image)], "controlnet_module": "invert"}
    answer = client.post("/controlnet/detect", json=body)
    assert answer.status_code == 200, answer.text
    [made] = answer.json()["images"]
    inverted = np.asarray(Image.open(io.BytesIO(base64.b64decode(made))))
    assert (inverted == 255 - np.asarray(image)).all()
    refused = client.post("/controlnet/detect", json=body | {"controlnet_module": "canny"})
    assert refused.status_code == 422
    assert refused.json()["detail"] == ("controlnet_module is 'canny'; allowed are: none, invert.")

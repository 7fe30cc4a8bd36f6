"""Clients of AUTOMATIC1111 against a running server; `webuiapi` is not changed."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from webuiapi import WebUIApi, WebUIApiResult

from server.http.automatic1111 import extras
from server.http.body import Bodies
from tests.server.conftest import Running

SIDE = 64
SMALL: dict[str, Any] = {"prompt": "a red circle", "seed": 5, "width": SIDE, "height": SIDE}


@pytest.fixture(scope="module")
def api(running: Running) -> Iterator[WebUIApi]:
    host, port = running.address
    made = WebUIApi(host=host, port=port, sampler="Euler", steps=2)
    yield made
    made.session.close()


def array(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"))


def native(client: httpx2.Client, **fields: Any) -> list[NDArray[np.uint8]]:
    body = SMALL | {"steps": 2, "sampler": "euler", "spacing": "linspace"} | fields
    answer = client.post("/v1/generate", json=body)
    assert answer.status_code == 200, answer.text
    files = (base64.b64decode(image["b64_json"]) for image in answer.json()["images"])
    return [array(Image.open(io.BytesIO(file))) for file in files]


def b64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def txt2img(api: WebUIApi, **fields: Any) -> WebUIApiResult:
    result = api.txt2img(**fields)
    assert isinstance(result, WebUIApiResult)
    return result


def img2img(api: WebUIApi, images: list[Image.Image], **fields: Any) -> WebUIApiResult:
    result = api.img2img(images, **fields)
    assert isinstance(result, WebUIApiResult)
    return result


def test_txt2img_makes_the_images_of_the_native_route(api: WebUIApi, client: httpx2.Client) -> None:
    result = txt2img(api, **SMALL, cfg_scale=4, batch_size=2, negative_prompt="a square")
    guidance = {"name": "cfg", "scale": 4}
    expected = native(client, n=2, guidance=guidance, negative_prompt="a square")
    assert len(result.images) == 2
    for image, pixels in zip(result.images, expected, strict=True):
        assert (array(image) == pixels).all()
    assert result.info["all_seeds"] == [5, 6]
    assert result.info["sampler_name"] == "Euler"
    assert result.info["warnings"] == []
    assert result.info["infotexts"][1].startswith("a red circle\nNegative prompt: a square\nSteps:")
    assert result.parameters["steps"] == 2


def test_variations_of_a_seed_are_those_of_the_native_route_and_read_back_from_their_text(
    api: WebUIApi, client: httpx2.Client
) -> None:
    told: dict[str, Any] = {"subseed": 40, "subseed_strength": 0.3}
    resized: dict[str, Any] = {"seed_resize_from_w": 96, "seed_resize_from_h": SIDE + 3}
    result = txt2img(api, **SMALL, **told, **resized, cfg_scale=1, batch_size=2)
    assert result.info["warnings"] == []
    assert (result.info["all_seeds"], result.info["all_subseeds"]) == ([5, 5], [40, 41])
    ours = {"variation": {"seed": 40, "strength": 0.3}, "noise_size": {"width": 96, "height": SIDE}}
    expected = native(client, n=2, guidance="none", **ours)
    for image, pixels in zip(result.images, expected, strict=True):
        assert (array(image) == pixels).all()
    assert (expected[0] != expected[1]).any()
    # Each image states what reproduces it alone, in AUTOMATIC1111's text and in ours.
    text: str = result.info["infotexts"][1]
    said = f"Variation seed: 41, Variation seed strength: 0.3, Seed resize from: 96x{SIDE}"
    assert said in text
    answer = client.post("/sdapi/v1/txt2img", json={"infotext": text, "cfg_scale": 1})
    (again,) = answer.json()["images"]
    assert (array(Image.open(io.BytesIO(base64.b64decode(again)))) == expected[1]).all()
    (own,) = native(client, **json.loads(result.images[1].info["weft"]))
    assert (own == expected[1]).all()
    # At full strength, it is the image of the other seed.
    (other,) = native(client, variation={"seed": 40, "strength": 1.0}, guidance="none")
    (there,) = native(client, seed=40, guidance="none")
    assert np.abs(other.astype(int) - there).max() <= 1


def test_prompts_joined_by_and_are_drawn_together_and_read_back(
    api: WebUIApi, client: httpx2.Client
) -> None:
    told = SMALL | {"prompt": "a (red:1.3) circle AND a blue square :0.5"}
    result = txt2img(api, **told, cfg_scale=4)
    assert result.info["warnings"] == []
    syntax = {"prompt_syntax": "automatic1111"}

    def composed(prompt: str, scale: float, other: str, weight: float) -> NDArray[np.uint8]:
        others = [{"prompt": other, "weight": weight}]
        rule = {"name": "composed", "scale": scale, "prompts": others}
        return native(client, prompt=prompt, guidance=rule, **syntax)[0]

    circle, square = ("a (red:1.3) circle", 4.0), ("a blue square", 2.0)
    expected = composed(*circle, *square)
    assert (array(result.image) == expected).all()
    # Both prompts are read in the same way, whichever one is the request's own.
    assert np.abs(composed(*square, *circle).astype(int) - expected).max() <= 1
    text: str = result.info["infotexts"][0]
    assert text.startswith("a (red:1.3) circle :1 AND a blue square :0.5\n")
    answer = client.post("/sdapi/v1/txt2img", json={"infotext": text})
    (again,) = answer.json()["images"]
    assert (array(Image.open(io.BytesIO(base64.b64decode(again)))) == expected).all()


def test_img2img_starts_from_an_image_and_repaints_what_the_mask_says(
    api: WebUIApi, client: httpx2.Client
) -> None:
    start = Image.new("RGB", (SIDE, SIDE), "white")
    guidance = {"name": "cfg", "scale": 7}
    changed = img2img(api, [start], **SMALL, denoising_strength=0.5)
    (expected,) = native(client, image=b64(start), strength=0.5, guidance=guidance)
    assert (array(changed.image) == expected).all()
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (16, 16, SIDE, SIDE))
    painted = img2img(
        api,
        [start],
        **SMALL,
        mask_image=mask,
        mask_blur=0,
        inpainting_fill=1,
        inpaint_full_res=False,
        denoising_strength=1,
    )
    (expected,) = native(client, image=b64(start), mask=b64(mask), guidance=guidance)
    assert (array(painted.image) == expected).all()
    assert painted.info["warnings"] == []
    black: dict[str, Any] = SMALL | {"prompt": "a red circle on a black background"}
    inverted = {"mask_blur": 0, "inpainting_mask_invert": 1, "denoising_strength": 1}
    kept = array(img2img(api, [start], **black, mask_image=mask, **inverted).image)
    assert (kept[32:56, 32:56] == 255).all()
    assert kept[:8].mean() < 200


def test_the_region_around_a_mask_is_drawn_at_full_size_and_put_back(api: WebUIApi) -> None:
    start = Image.new("RGB", (3 * SIDE, 2 * SIDE), "green")
    mask = Image.new("L", start.size)
    mask.paste(255, (130, 66, 174, 110))
    options = {"mask_blur": 0, "inpainting_fill": 1, "denoising_strength": 1}
    result = img2img(api, [start], **SMALL, mask_image=mask, **options)
    pixels, painted = array(result.image), np.asarray(mask) > 0
    assert result.image.size == start.size
    assert (pixels[~painted] == array(start)[~painted]).all()
    assert pixels[painted].std() > 10
    assert result.info["width"] == SIDE
    assert result.info["warnings"] == []


def test_lists_are_what_the_client_expects(api: WebUIApi) -> None:
    samplers, schedulers = api.util_get_sampler_names(), api.util_get_scheduler_names()
    assert {"Euler a", "DPM++ 2M", "UniPC", "ghvb"} <= set(samplers)
    assert {"automatic", "karras", "sgm_uniform", "align_your_steps"} <= set(schedulers)
    # Other tests add adapters to the folder of the same server.
    assert "embedded-lcm-lora" in {one["name"] for one in api.get_loras()}
    assert api.get_memory()["ram"]["total"] > 2**30
    assert api.get_embeddings().keys() == {"loaded", "skipped"}
    assert [one["name"] for one in api.get_upscalers()] == ["None", "Lanczos"]
    for empty in (api.get_sd_vae, api.get_prompt_styles, api.get_hypernetworks):
        assert empty() == []
    for path in ("sd-modules", "extensions"):
        assert api.custom_get(path, baseurl=True) == []
    told = api.custom_get("script-info", baseurl=True)
    assert {one["name"] for one in told if one["is_img2img"]} == {*api.get_scripts()["img2img"]}
    assert api.refresh_checkpoints() == {}


def test_a_model_is_chosen_by_a_setting_and_by_a_request(api: WebUIApi) -> None:
    assert api.util_get_model_names() == ["embedded", "embedded-lcm"]
    api.util_set_model("Embedded-LCM")
    try:
        assert api.util_get_current_model() == "embedded-lcm"
        few = txt2img(api, **SMALL, sampler_name="LCM")
        assert few.info["sd_model_name"] == "embedded-lcm"
        # Its guidance is an input of the network, whatever the client sends.
        assert "Guidance policy: embedded" in few.info["infotexts"][0]
        named = {"sd_model_checkpoint": "embedded.safetensors [0123456789]"}
        other = txt2img(api, **SMALL, override_settings=named)
        assert other.info["sd_model_name"] == "embedded"
    finally:
        api.set_options(api.get_options() | {"sd_model_checkpoint": "embedded"})
    with pytest.raises(RuntimeError, match="is not hosted here"):
        txt2img(api, **SMALL, override_settings={"sd_model_checkpoint": "other"})


def test_a_prompt_chooses_loras(api: WebUIApi, client: httpx2.Client) -> None:
    tagged: dict[str, Any] = SMALL | {"prompt": "a red circle <lora:embedded-lcm-lora:0.5>"}
    result = txt2img(api, **tagged, cfg_scale=1)
    adapters = [{"name": "embedded-lcm-lora", "weight": 0.5}]
    (expected,) = native(client, adapters=adapters, guidance="none")
    assert (array(result.image) == expected).all()


def test_weights_and_changes_of_a_prompt_act_and_are_read_back_and_long_prompts_are_taken(
    api: WebUIApi, client: httpx2.Client
) -> None:
    prompt = "a [(red:1.4):blue:1] circle"
    result = txt2img(api, **SMALL | {"prompt": prompt, "steps": 3})
    asked = {"prompt": prompt, "guidance": {"name": "cfg", "scale": 7}, "steps": 3}
    (expected,) = native(client, **asked, prompt_syntax="automatic1111")
    (plain,) = native(client, **asked)
    assert (array(result.image) == expected).all()
    assert (expected != plain).any()
    again = client.post("/v1/generate", json=result.info["settings"]).json()
    file = base64.b64decode(again["images"][0]["b64_json"])
    assert (array(Image.open(io.BytesIO(file))) == expected).all()
    text: str = result.info["infotexts"][0]
    assert text.startswith(f"{prompt}\n")
    read_back = client.post("/sdapi/v1/txt2img", json={"infotext": text}).json()
    file = base64.b64decode(read_back["images"][0])
    assert (array(Image.open(io.BytesIO(file))) == expected).all()
    long: dict[str, Any] = SMALL | {"prompt": "a red circle, " * 20, "negative_prompt": "blurry"}
    assert txt2img(api, **long).images[0].size == (SIDE, SIDE)


def test_what_a_plain_prompt_s_text_is_read_back_as_draws_the_same_image(
    client: httpx2.Client,
) -> None:
    told = {"prompt": "a [big:(red):1] circle BREAK", "negative_prompt": "(blue:1.6)"}
    guidance = {"name": "cfg", "scale": 5}
    body = SMALL | {"steps": 2, "sampler": "euler"} | told | {"guidance": guidance}
    (image,) = client.post("/v1/generate", json=body).json()["images"]
    file = Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))
    text = file.info["parameters"]
    assert text.startswith(r"a \[big:\(red\):1\] circle B\REAK" + "\nNegative prompt: \\(blue")
    (again,) = client.post("/sdapi/v1/txt2img", json={"infotext": text}).json()["images"]
    difference = array(Image.open(io.BytesIO(base64.b64decode(again)))).astype(int) - array(file)
    assert np.abs(difference).max() <= 1
    # If nothing is escaped, the words in brackets have a larger weight.
    (other,) = native(client, **told, guidance=guidance, prompt_syntax="automatic1111")
    assert np.abs(other.astype(int) - array(file)).max() > 10


@pytest.mark.usefixtures("slow_denoiser")
def test_progress_shows_a_preview_and_an_interruption_returns_it(
    running: Running, api: WebUIApi
) -> None:
    api.util_wait_for_ready()
    results: list[Any] = []
    long: dict[str, Any] = SMALL | {"steps": 200, "batch_size": 2}
    drawing = threading.Thread(target=lambda: results.append(txt2img(api, **long)))
    drawing.start()
    seen: list[dict[str, Any]] = []

    def shown() -> bool:
        seen.append(api.get_progress())
        return bool(seen[-1]["current_image"])

    running.wait(shown)
    assert 0 < seen[-1]["progress"] < 1
    assert seen[-1]["eta_relative"] > 0
    assert seen[-1]["state"]["job_count"] == 2
    assert seen[-1]["state"]["sampling_steps"] == 200
    preview = Image.open(io.BytesIO(base64.b64decode(seen[-1]["current_image"])))
    assert preview.format == "PNG"
    assert api.interrupt() == {}
    drawing.join()
    assert [image.size for image in results[0].images] == [(SIDE, SIDE)] * 2
    running.settle()
    assert api.get_progress()["progress"] == 0
    assert api.skip() == {}


@pytest.mark.usefixtures("slow_denoiser")
def test_an_identifier_that_is_sent_twice_harms_neither_request(client: httpx2.Client) -> None:
    headers = {"x-request-id": "the-same"}
    answers: list[int] = []

    def draw(steps: int) -> None:
        body = SMALL | {"steps": steps}
        answers.append(client.post("/sdapi/v1/txt2img", json=body, headers=headers).status_code)

    long = threading.Thread(target=lambda: draw(200))
    long.start()
    while client.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0:
        pass
    draw(1)
    assert client.get("/sdapi/v1/progress").json()["state"]["job_count"] == 1
    client.post("/sdapi/v1/interrupt")
    long.join()
    assert answers == [409, 200]


def test_a_picture_that_a_region_is_put_back_into_counts_as_a_body(
    running: Running, client: httpx2.Client
) -> None:
    bodies: Bodies = running.app.state.bodies
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (16, 16, SIDE, SIDE))
    body = SMALL | {"steps": 1, "init_images": [b64(Image.new("RGB", (SIDE, SIDE)))]}
    body |= {"mask": b64(mask), "inpaint_full_res": True}
    most, bodies._max_bytes = bodies._max_bytes, SIDE * SIDE
    try:
        assert client.post("/sdapi/v1/img2img", json=body).status_code == 429
        bodies._max_bytes = SIDE * SIDE * 4
        assert client.post("/sdapi/v1/img2img", json=body).status_code == 200
    finally:
        bodies._max_bytes = most
    assert bodies.held == 0


def test_png_info_reads_what_was_written(api: WebUIApi, client: httpx2.Client) -> None:
    result = txt2img(api, **SMALL)
    told = api.png_info(result.image)
    assert told.info == result.info["infotexts"][0]
    assert told.parameters["Sampler"] == "Euler"
    assert (told.parameters["Size-1"], told.parameters["Prompt"]) == (f"{SIDE}", "a red circle")
    assert set(told.json["items"]) == {"weft"}
    webp = client.post("/v1/generate", json=SMALL | {"steps": 1, "output_format": "webp"}).json()
    body = {"image": webp["images"][0]["b64_json"]}
    answer = client.post("/sdapi/v1/png-info", json=body).json()
    assert answer["info"].startswith("a red circle\nSteps: 1, Sampler: DPM++ 2M")
    blank = client.post("/sdapi/v1/png-info", json={"image": b64(Image.new("L", (8, 8)))}).json()
    assert blank == {"info": "", "items": {}, "parameters": {}}


def test_an_image_is_enlarged(api: WebUIApi) -> None:
    ramp = Image.linear_gradient("L").convert("RGB").resize((40, 20))
    twice = api.extra_single_image(ramp, upscaler_1="Lanczos", upscaling_resize=2)
    assert isinstance(twice, WebUIApiResult)
    assert (array(twice.image) == array(ramp.resize((80, 40), Image.Resampling.LANCZOS))).all()
    to_size: dict[str, Any] = {"resize_mode": 1, "upscaling_resize_w": 30, "upscaling_resize_h": 30}
    cropped = api.extra_single_image(ramp, upscaler_1="Lanczos", upscaling_crop=True, **to_size)
    assert isinstance(cropped, WebUIApiResult)
    assert cropped.image.size == (30, 30)
    both = api.extra_batch_images([ramp, ramp.rotate(180)], upscaler_1="Lanczos")
    assert isinstance(both, WebUIApiResult)
    assert [array(one)[-1, 0, 0] > 128 for one in both.images] == [True, False]
    assert (array(both.images[0]) == array(twice.image)).all()
    with pytest.raises(RuntimeError, match="imageList has 17 images; at most"):
        api.extra_batch_images([ramp] * 17)
    with pytest.raises(RuntimeError, match="allowed are: None, Lanczos"):
        api.extra_single_image(ramp, upscaler_1="R-ESRGAN 4x+")
    with pytest.raises(RuntimeError, match="pixels are allowed"):
        api.extra_single_image(ramp, upscaler_1="Lanczos", upscaling_resize=8000)
    with pytest.raises(RuntimeError, match="gfpgan_visibility is 1"):
        api.extra_single_image(ramp, gfpgan_visibility=1)


def test_images_are_enlarged_one_after_the_other(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, they would occupy for seconds the threads that every request needs."""
    make, at_once = extras._made, [0, 0]

    def counting(*arguments: Any) -> str:
        at_once[0] += 1
        at_once[1] = max(at_once)
        time.sleep(0.05)
        made = make(*arguments)
        at_once[0] -= 1
        return made

    monkeypatch.setattr(extras, "_made", counting)
    body = {"image": b64(Image.new("RGB", (8, 8))), "upscaler_1": "Lanczos"}

    def enlarge(_: int) -> int:
        return client.post("/sdapi/v1/extra-single-image", json=body).status_code

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(enlarge, range(4))) == {200}
    assert at_once == [0, 1]


REFUSED: dict[str, tuple[Callable[[WebUIApi], Any], str]] = {
    "sampler": (
        lambda api: txt2img(api, **SMALL, sampler_name="Euler b"),
        "similar names are: Euler a",
    ),
    "steps": (lambda api: txt2img(api, prompt="x", steps=1000), "at most 200"),
    "images": (lambda api: img2img(api, [], **SMALL), "init_images is required"),
    "size": (lambda api: txt2img(api, prompt="x", width=8000, height=8000), "pixels are allowed"),
    "captions": (lambda api: api.interrogate(Image.new("RGB", (8, 8))), "that describes images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_a_sentence(api: WebUIApi, name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(RuntimeError) as refusal:
        call(api)
    status, text = refusal.value.args
    assert status == (404 if name == "captions" else 422)
    assert words in text


def test_errors_have_the_form_of_automatic1111(client: httpx2.Client) -> None:
    for answer in (
        client.post("/sdapi/v1/txt2img", json={"steps": 0}),
        client.post("/sdapi/v1/txt2img", content="{", headers={"content-type": "application/json"}),
        client.get("/sdapi/v1/none"),
    ):
        assert answer.status_code in (400, 404, 422)
        assert set(answer.json()) == {"error", "detail", "body", "errors"}
        assert answer.json()["detail"].endswith(".")


def test_fields_and_scripts_of_other_programs_do_no_harm(client: httpx2.Client) -> None:
    scripts = {
        "ADetailer": {"args": [False]},
        "Segment Anything": {"args": [{"image": "A" * 100_000}]},
        "ControlNet": {"args": [{"enabled": False, "image": "A" * 100_000}]},
    }
    body = SMALL | {
        "steps": 1,
        "alwayson_scripts": scripts,
        "adetailer_prompt": "x" * 50_000,
        "y": None,
    }
    answer = client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    assert "there is no equivalent here: scripts." in answer.json()["info"]


def test_a_client_that_looks_for_captions_finds_none(client: httpx2.Client) -> None:
    """sd-backend-client 0.5.0 takes any other status as captions, and offers them to its users."""
    answer = client.get("/sdapi/v1/interrogate")
    assert answer.status_code == 404
    assert "that describes images" in answer.json()["detail"]


def test_sillytavern_s_calls_are_answered(client: httpx2.Client) -> None:
    """What its server sends, in its order (src/endpoints/stable-diffusion.js)."""
    client.headers["authorization"] = "Basic Og=="
    try:
        assert client.get("/internal/ping").status_code == 200
        for path in ("upscalers", "latent-upscale-modes"):
            assert all(one["name"] for one in client.get(f"/sdapi/v1/{path}").json())
        assert client.get("/sdapi/v1/sd-vae").json() == []
        assert all(one["name"] for one in client.get("/sdapi/v1/samplers").json())
        assert all(one["name"] for one in client.get("/sdapi/v1/schedulers").json())
        titles = [one["title"] for one in client.get("/sdapi/v1/sd-models").json()]
        options = client.get("/sdapi/v1/options").json()
        assert options["sd_model_checkpoint"] in titles
        assert "forge_preset" not in options
        answer = client.post("/sdapi/v1/options", json=options)
        assert answer.status_code == 200
        state = client.get("/sdapi/v1/progress").json()
        assert state["progress"] == 0.0
        assert state["state"]["job_count"] == 0
        body = SMALL | {
            "negative_prompt": "",
            "sampler_name": "Euler a",
            "scheduler": "normal",
            "steps": 2,
            "cfg_scale": 7,
            "restore_faces": False,
            "enable_hr": False,
            "hr_upscaler": "Latent",
            "hr_scale": 1,
            "hr_additional_modules": [],
            "denoising_strength": 0.7,
            "hr_second_pass_steps": 0,
            "seed": -1,
            "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
            "override_settings_restore_afterwards": True,
            "clip_skip": 1,
            "save_images": True,
            "send_images": True,
            "do_not_save_grid": False,
            "do_not_save_samples": False,
        }
        answer = client.post("/sdapi/v1/txt2img", json=body).json()
        image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
        assert image.size == (SIDE, SIDE)
        assert '"warnings": []' in answer["info"]
        assert client.post("/sdapi/v1/interrupt").status_code == 200
    finally:
        del client.headers["authorization"]


def test_open_webui_s_calls_are_answered(client: httpx2.Client) -> None:
    """What its AUTOMATIC1111 image engine sends, in its order."""
    headers = {"authorization": ""}
    assert client.get("/sdapi/v1/options", headers=headers).status_code == 200
    models = client.get("/sdapi/v1/sd-models", headers=headers).json()
    assert all(one["title"] and one["model_name"] for one in models)
    options = client.get("/sdapi/v1/options", headers=headers).json()
    options["sd_model_checkpoint"] = models[0]["title"]
    assert client.post("/sdapi/v1/options", json=options, headers=headers).status_code == 200
    body = {"prompt": "a red circle", "batch_size": 1, "width": SIDE, "height": SIDE, "steps": 2}
    body |= {"cfg_scale": 5.0, "sampler_name": "DPM++ 2M", "scheduler": "Karras"}
    answer = client.post("/sdapi/v1/txt2img", json=body, headers=headers).json()
    for image in answer["images"]:
        assert Image.open(io.BytesIO(base64.b64decode(image))).size == (SIDE, SIDE)

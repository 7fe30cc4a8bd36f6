"""`/v1/generate` as one answer, on the real engine."""

import base64
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from guidance import RULES
from samplers import SAMPLERS, SPACINGS
from server.requests.choice import name_of
from tests.covering import covering
from tests.server.conftest import MAX_IMAGES

Generate = Callable[..., httpx2.Response]

PARTICLES = {"name": "cfg", "particles": "fkc"}
OF_ITS_OWN: dict[str, Any] = {"width": None, "height": None}
"""Fields of a request that leaves the size to the server."""
WHITE = np.full((128, 128, 3), 255, np.uint8)


def b64_png(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def file_of(answer: httpx2.Response, index: int = 0) -> bytes:
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["images"][index]["b64_json"])


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)))


def settings_text(data: bytes) -> str:
    """The settings that a file holds."""
    return Image.open(io.BytesIO(data)).info["weft"]


def message_of(answer: httpx2.Response, status: int = 422) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


def test_the_answer_says_what_was_done(generate: Generate) -> None:
    answer = generate(headers={"x-request-id": "mine-1"}).json()
    assert set(answer) == {
        "id",
        "created",
        "model",
        "images",
        "settings",
        "statistics",
        "warnings",
        "notes",
        "evaluations",
        "particles",
        "timings",
    }
    assert answer["warnings"] == []
    assert answer["statistics"] is None
    assert answer["particles"] is None
    assert answer["id"] == "mine-1"
    assert answer["model"] == "embedded"
    assert answer["settings"]["sampler"]["name"] == "dpm_solver_pp"
    assert answer["settings"]["spacing"]["name"] == "trailing"
    assert answer["settings"]["guidance"] == {
        "name": "apg",
        "scale": 4.0,
        "eta": 0.0,
        "norm_threshold": 15.0,
        "momentum": -0.5,
        "policy": {"name": "always"},
        "perturbed": [],
    }
    assert answer["evaluations"] == {"spent": 4, "saved": 0}
    assert set(answer["timings"]) == {"queue_s", "denoise_s", "decode_s", "total_s"}
    assert answer["timings"]["total_s"] >= answer["timings"]["denoise_s"] > 0


def test_the_answer_says_what_has_no_effect(generate: Generate) -> None:
    answer = generate(guidance="none", negative_prompt="a square").json()
    assert answer["warnings"] == [
        "negative_prompt has no effect: guidance 'none' evaluates only the prompt."
    ]


def test_statistics_of_the_model_need_no_guidance_to_be_named(generate: Generate) -> None:
    answer = generate(sampler="dpm_solver_v3", steps=5).json()
    assert answer["settings"]["guidance"]["name"] == "cfg"


def test_the_same_seed_gives_the_same_bytes(generate: Generate) -> None:
    assert file_of(generate()) == file_of(generate())
    assert file_of(generate()) != file_of(generate(seed=6))


def test_particles_tell_their_descent_and_their_settings_make_them_again(
    generate: Generate, client: httpx2.Client
) -> None:
    first = generate(n=2, sampler={"name": "ddim", "eta": 1}, guidance=PARTICLES, steps=4)
    answer = first.json()
    assert len(answer["particles"]["ancestors"]) == 2
    assert len(answer["particles"]["effective"]) == 3
    assert all(1 <= size <= 2 for size in answer["particles"]["effective"])
    assert answer["evaluations"]["spent"] == 2 * 2 * 4
    again = client.post("/v1/generate", json=answer["settings"])
    assert [file_of(again, i) for i in (0, 1)] == [file_of(first, i) for i in (0, 1)]
    written = json.loads(Image.open(io.BytesIO(file_of(first, 1))).info["weft"])
    assert written["n"] == 2


def test_image_i_is_the_image_of_seed_plus_i(generate: Generate) -> None:
    several = generate(n=3, seed=40)
    assert [image["seed"] for image in several.json()["images"]] == [40, 41, 42]
    assert file_of(several, 2) == file_of(generate(seed=42))


def test_a_random_seed_is_reported(generate: Generate) -> None:
    first = generate(seed=None)
    seed = first.json()["images"][0]["seed"]
    assert first.json()["settings"]["seed"] == seed
    assert file_of(generate(seed=seed)) == file_of(first)
    assert generate(seed=None).json()["images"][0]["seed"] != seed


SAMPLER_NAMES = [name_of(member) for member in SAMPLERS]
Exchange = tuple[httpx2.Response, httpx2.Response]


@pytest.fixture(scope="module")
def posted_back(client: httpx2.Client, generate: Generate) -> dict[str, Exchange]:
    """Answers of each sampler: to a request, and to its settings; several share forwards."""
    guidance = {"name": "apg", "scale": 3, "policy": {"name": "adaptive", "threshold": 0.9}}

    def exchange(sampler: str) -> Exchange:
        # Exact statistics exist only for plain guidance.
        nearest = {"statistics": "nearest"} if sampler == "dpm_solver_v3" else {}
        wanted = {"name": sampler} | nearest
        first = generate(sampler=wanted, guidance=guidance, negative_prompt="a square")
        return first, client.post("/v1/generate", json=first.json().get("settings"))

    with ThreadPoolExecutor(MAX_IMAGES) as pool:
        return dict(zip(SAMPLER_NAMES, pool.map(exchange, SAMPLER_NAMES), strict=True))


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_settings_posted_back_make_the_same_picture(
    posted_back: dict[str, Exchange], sampler: str
) -> None:
    first, again = (answer.json() for answer in posted_back[sampler])
    assert again["settings"] == first["settings"]
    assert again["images"] == first["images"]
    assert again["evaluations"] == first["evaluations"]


# A list of times has no default.
NAMED_SPACINGS = sorted({name_of(kind) for kind in SPACINGS} - {"custom"})
SPACED_AND_GUIDED = covering(product(NAMED_SPACINGS, map(name_of, RULES)), tuple)


@pytest.fixture(scope="module")
def spaced_and_guided(generate: Generate) -> dict[tuple[str, str], httpx2.Response]:
    def answer(cell: tuple[str, str]) -> httpx2.Response:
        return generate(spacing=cell[0], guidance=cell[1])

    with ThreadPoolExecutor(MAX_IMAGES) as pool:
        return dict(zip(SPACED_AND_GUIDED, pool.map(answer, SPACED_AND_GUIDED), strict=True))


@pytest.mark.parametrize(("spacing", "rule"), SPACED_AND_GUIDED)
def test_every_spacing_and_rule_makes_a_picture(
    spaced_and_guided: dict[tuple[str, str], httpx2.Response], spacing: str, rule: str
) -> None:
    answer = spaced_and_guided[spacing, rule]
    assert pixels_of(file_of(answer)).shape == (64, 64, 3)
    assert answer.json()["settings"]["spacing"]["name"] == spacing


def test_listed_times_are_as_many_steps_as_they_are(generate: Generate) -> None:
    spacing = {"name": "custom", "times": [999, 600, 200]}
    answer = generate(spacing=spacing, steps=None)
    assert answer.json()["settings"]["steps"] == 3
    assert answer.json()["settings"]["spacing"] == spacing


@pytest.mark.parametrize(
    ("fields", "field", "sentence"),
    [
        (
            {"spacing": "custom"},
            "spacing.times",
            "spacing.times is empty; it must list one time for each step",
        ),
        (
            {"spacing": {"name": "custom", "times": [999, 10]}, "steps": 7},
            "steps",
            "steps is 7; it must be 2, the number of entries in spacing.times.",
        ),
        (
            {"spacing": {"name": "custom", "times": [10, 20]}, "steps": 2},
            "spacing.times",
            "spacing.times go from 10 to 20; each must be below the one before it.",
        ),
        (
            {"spacing": {"name": "align_your_steps", "table": "svd"}},
            "spacing.table",
            "spacing.table is 'svd', which starts at a sigma of 700; this model's noisiest is",
        ),
    ],
    ids=str,
)
def test_spacings_that_do_not_suit_are_refused_by_their_field(
    generate: Generate, fields: dict[str, Any], field: str, sentence: str
) -> None:
    answer = generate(**fields)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(sentence)


def test_the_chunk_in_a_png_makes_the_same_png(client: httpx2.Client, generate: Generate) -> None:
    data = file_of(generate(n=2, prompt="赤い円", guidance="cfg_plus_plus"), 1)
    image = Image.open(io.BytesIO(data))
    settings = json.loads(image.text["weft"])  # type: ignore[attr-defined]
    assert file_of(client.post("/v1/generate", json=settings)) == data


def test_a_png_tells_others_of_its_settings(generate: Generate) -> None:
    answer = generate(prompt="a red circle", negative_prompt="a square", spacing="karras", steps=4)
    image = Image.open(io.BytesIO(file_of(answer)))
    prompt, negative, line = image.text["parameters"].split("\n")  # type: ignore[attr-defined]
    assert (prompt, negative) == ("a red circle", "Negative prompt: a square")
    fields = dict(field.split(": ") for field in line.split(", "))
    assert fields.pop("Version").startswith("weft ")
    assert len(fields.pop("Model hash")) == 10
    assert fields == {
        "Steps": "4",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "4",
        "Seed": "5",
        "Size": "64x64",
        "Model": "embedded",
        "Guidance": "apg",
        "Guidance policy": "always",
    }


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_accept_chooses_bytes(generate: Generate, name: str) -> None:
    media = f"image/{name}"
    answer = generate(headers={"accept": media}, seed=None)
    assert answer.headers["content-type"] == media
    assert pixels_of(answer.content).shape == (64, 64, 3)
    seed = int(answer.headers["x-seed"])
    assert file_of(generate(seed=seed, output_format=name)) == answer.content


def test_accept_of_any_image_keeps_the_format(generate: Generate) -> None:
    answer = generate(headers={"accept": "text/html, image/*;q=0.9"}, output_format="webp")
    assert answer.headers["content-type"] == "image/webp"


@pytest.mark.parametrize(
    ("accept", "fields", "status", "field"),
    [
        ("image/png", {"n": 2}, 422, "n"),
        ("image/png", {"output_format": "webp"}, 422, "output_format"),
        ("image/png", {"stream": True}, 422, "stream"),
        ("text/html", {}, 406, "accept"),
        ("application/json;q=0", {}, 406, "accept"),
    ],
)
def test_accept_and_body_must_agree(
    generate: Generate, accept: str, fields: dict[str, Any], status: int, field: str
) -> None:
    answer = generate(headers={"accept": accept}, **fields)
    assert message_of(answer, status)
    assert answer.json()["error"]["param"] == field


def test_img2img_goes_through_a_share_of_the_steps(generate: Generate) -> None:
    start = WHITE.copy()
    start[:, :64] = 0
    answer = generate(image=b64_png(start), strength=0.4, steps=10)
    assert answer.json()["settings"]["strength"] == 0.4
    assert answer.json()["evaluations"]["spent"] == 8
    assert file_of(answer) == file_of(generate(image=b64_png(start), strength=0.4, steps=10))
    assert file_of(answer) != file_of(generate(image=b64_png(WHITE), strength=0.4, steps=10))


def test_strength_defaults_to_three_quarters_and_to_all_under_a_mask(generate: Generate) -> None:
    picture = b64_png(WHITE)
    assert generate(image=picture, steps=4).json()["settings"]["strength"] == 0.75
    assert generate(image=picture, steps=1).json()["settings"]["strength"] == 1.0
    masked = generate(image=picture, mask=picture, steps=4)
    assert masked.json()["settings"]["strength"] == 1.0


def test_inpainting_repaints_the_white_part_alone(generate: Generate) -> None:
    mask = np.zeros((128, 128), np.uint8)
    mask[:, 64:] = 255
    uploads = {"image": b64_png(WHITE), "mask": b64_png(mask)}
    painted = pixels_of(file_of(generate(**uploads, **OF_ITS_OWN, steps=4)))
    assert (painted[:, :64] == WHITE[:, :64]).all()
    assert np.abs(painted[:, 64:].astype(float) - WHITE[:, 64:]).mean() > 10


def test_pictures_keep_away_from_one_that_was_sent(generate: Generate) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (100, 50, 3), np.uint8)
    fields: dict[str, Any] = {
        "guidance": {"name": "cfg", "negtome": {"stop": 0.5, "strength": 3}},
        "steps": 2,
        **OF_ITS_OWN,
    }
    answer = generate(reference=b64_png(picture), n=2, **fields)
    assert pixels_of(file_of(answer)).shape == (128, 128, 3)
    assert answer.json()["settings"]["guidance"]["negtome"]["away_from"] == "reference"
    assert answer.json()["evaluations"]["spent"] == 2 * (2 * 2 + 1)
    # Each alone: its seed reproduces it, which fails for images that keep apart.
    again = generate(reference=b64_png(picture), seed=6, **fields)
    assert file_of(again) == file_of(answer, 1)
    other = generate(reference=b64_png(255 - picture), seed=6, **fields)
    assert not np.array_equal(pixels_of(file_of(other)), pixels_of(file_of(again)))


def test_the_size_of_a_picture_is_the_default_size(generate: Generate) -> None:
    answer = generate(image=b64_png(WHITE[:96]), **OF_ITS_OWN)
    assert (answer.json()["settings"]["width"], answer.json()["settings"]["height"]) == (128, 96)
    assert pixels_of(file_of(answer)).shape == (96, 128, 3)
    resized = generate(image=b64_png(WHITE[:50]), width=64, height=64)
    assert pixels_of(file_of(resized)).shape == (64, 64, 3)


def test_an_upload_of_any_size_is_drawn(generate: Generate) -> None:
    """A size that the model cannot draw is changed to one that it can."""
    answer = generate(image=b64_png(WHITE[:103, :75]), **OF_ITS_OWN)
    settings = answer.json()["settings"]
    assert (settings["width"], settings["height"]) == (72, 104)
    assert settings["resize_mode"] == "stretch"


def test_an_upload_is_cropped_on_request(generate: Generate) -> None:
    """The mask repaints nothing in the middle, so there the picture is the one that was sent."""
    picture = np.zeros((128, 256, 3), np.uint8)
    picture[:, 64:192] = 255
    corner = np.zeros((128, 256), np.uint8)
    corner[:16, 64:80] = 255
    uploads = {"image": b64_png(picture), "mask": b64_png(corner), "width": 128, "height": 128}
    cropped, stretched = (
        pixels_of(file_of(generate(**uploads, resize_mode=mode, steps=2))) for mode in (1, 0)
    )
    assert (cropped[64:] == 255).all()
    assert (stretched[64:, 40:88] == 255).all()
    assert (stretched[64:, :24] == 0).all()


def test_settings_of_a_file_post_back_with_its_uploads(
    client: httpx2.Client, generate: Generate
) -> None:
    """Unchanged, for image to image and for inpainting, under other programs' names."""
    mask = np.zeros((128, 128), np.uint8)
    mask[:, 64:] = 255
    picture = {"image": b64_png(WHITE[:70]), "resize_mode": "fill"}
    fields = {"sampler": "er_sde", "spacing": "beta57", "cfg_scale": 3, "steps": 2, "n": 2}
    for uploads in (picture | OF_ITS_OWN, picture | {"mask": b64_png(mask)}):
        first = file_of(generate(**fields, **uploads), 1)
        settings = json.loads(settings_text(first))
        again = {name: data for name, data in uploads.items() if name in ("image", "mask")}
        assert file_of(client.post("/v1/generate", json=settings | again)) == first


def test_settings_of_a_started_picture_are_refused_without_it(
    client: httpx2.Client, generate: Generate
) -> None:
    settings = generate(image=b64_png(WHITE)).json()["settings"]
    answer = client.post("/v1/generate", json=settings)
    assert message_of(answer) == "strength needs an image; send one or leave strength out."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 201}, "steps is 201; at most 200 is allowed."),
        ({"n": 9}, "n is 9; at most 8 is allowed."),
        (
            {"seed": 2**63 - 1, "n": 2},
            f"seed is {2**63 - 1}; seed + n - 1 must be at most {2**63 - 1}.",
        ),
        ({"prompt": "é" * 2049}, "prompt has 4098 bytes; at most 4096 are allowed."),
        (
            {"guidance": {"name": "composed", "prompts": [{"prompt": "\u3000" * 1366}]}},
            "guidance has 4098 bytes; at most 4096 are allowed.",
        ),
        (
            {"guidance": {"name": "composed", "prompts": [{"prompt": "a\0"}]}},
            r"A prompt of guidance has the character '\x00' at position 1; only text is allowed.",
        ),
        (
            {"negative_prompt": "x" * 4097},
            "negative_prompt has 4097 bytes; at most 4096 are allowed.",
        ),
        ({"width": 100}, "width is 100; model 'embedded' needs a multiple of 8."),
        ({"height": 129}, "height is 129; model 'embedded' needs a multiple of 8."),
        (
            {"width": 16384, "height": 128},
            "width x height is 16384 x 128; at most 1048576 pixels are allowed.",
        ),
        ({"prompt": "a " * 40}, "prompt has 40 tokens; model 'embedded' takes at most 30."),
        (
            {"guidance": {"name": "none", "policy": "adaptive"}},
            "guidance.policy is 'adaptive'; the rule 'none' makes one prediction only; leave the "
            "policy out.",
        ),
        ({"strength": 0.5}, "strength needs an image; send one or leave strength out."),
        ({"mask": b64_png(WHITE)}, "mask needs an image; send one or leave mask out."),
        (
            {"image": b64_png(WHITE), "strength": 0.1, "steps": 4},
            "strength is 0.1, which leaves none of 4 steps; at least 0.25 is needed.",
        ),
        (
            {"image": b64_png(WHITE), "height": 100},
            "height is 100; model 'embedded' needs a multiple of 8.",
        ),
        (
            {"resize_mode": "crop"},
            "resize_mode needs an image; send one or leave resize_mode out.",
        ),
        (
            {"image": "AAAA"},
            "image is not an image in a supported format; allowed are: PNG, JPEG, WebP.",
        ),
        (
            {"reference": "AAAA", "guidance": {"name": "cfg", "negtome": {}}},
            "reference is not an image in a supported format; allowed are: PNG, JPEG, WebP.",
        ),
        (
            {"image": b64_png(WHITE), "mask": b64_png(WHITE * 0)},
            "mask is black everywhere, so that nothing would be repainted; paint white and opaque "
            "what should change.",
        ),
        (
            {"reference": b64_png(WHITE)},
            "reference has no effect without guidance.negtome; add that or leave reference out.",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(
    generate: Generate, fields: dict[str, Any], message: str
) -> None:
    answer = generate(**fields)
    assert message_of(answer) == message
    assert answer.json()["error"]["param"] in message


def test_a_large_picture_is_refused(generate: Generate) -> None:
    large = b64_png(np.zeros((1, 2**23 + 1, 3), np.uint8))
    avoiding = {"name": "cfg", "negtome": {}}
    assert "at most 8388608 pixels" in message_of(generate(image=large), 413)
    refused = generate(reference=large, guidance=avoiding)
    assert "at most 8388608 pixels" in message_of(refused, 413)


def test_an_unknown_model_is_not_found(generate: Generate) -> None:
    answer = generate(model="../etc")
    expected = "model '../etc' is not hosted here; allowed are: embedded, embedded-lcm."
    assert message_of(answer, 404) == expected


def test_a_full_queue_says_when_to_come_back(
    client: httpx2.Client, generate: Generate, running: Any
) -> None:
    full = {"prompt": "a red circle", "steps": 200, "n": 8, "stream": True}
    with client.stream("POST", "/v1/generate", json=full) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: queued"
        answer = generate()
        assert message_of(answer, 429).startswith("The queue is full; try again in ")
        assert int(answer.headers["retry-after"]) >= 1
    running.settle()


def test_two_requests_with_one_identifier_are_told_apart(
    client: httpx2.Client, generate: Generate, running: Any
) -> None:
    headers = {"x-request-id": "twice", "accept": "text/event-stream"}
    body = {"prompt": "a red circle", "steps": 100, "width": 64, "height": 64}
    with client.stream("POST", "/v1/generate", json=body, headers=headers) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: queued"
        answer = generate(headers={"x-request-id": "twice"})
        assert message_of(answer, 409)
    running.settle()
    assert generate(headers={"x-request-id": "twice-again"}).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "start"),
    [
        (b"{", 400, "The body is not valid JSON: "),
        (b'{"prompt": "\xff"}', 400, "The body is not valid JSON: "),
        (b'{"prompt": ' + b"[" * 100_000, 400, "The body is not valid JSON: recursion limit"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, "The body is not valid JSON: "),
        (b"[]", 422, "The body must be a JSON object."),
        (b"null", 422, "The body must be a JSON object."),
        (b'"x"', 422, "The body must be a JSON object."),
        (b"", 422, "The body must be a JSON object."),
        (b'{"prompt": "x", "strength": NaN}', 422, "strength is nan; it must be a finite number."),
        (b'{"prompt": "x", "strength": 1e999}', 422, "strength is inf; it must be a finite"),
        (b'{"prompt": "x", "seed": ' + b"9" * 4000 + b"}", 422, "seed is too long; it must be"),
        (b'{"prompt": "\\ud800"}', 400, "The body is not valid JSON: "),
        (b'{"prompt": "x", "\\ud800": 1}', 400, "The body is not valid JSON: "),
        (b'{"prompt": "\\u0007"}', 422, "prompt has the character '\\x07' at position 0"),
        (b'{"prompt": "x", "image": 1}', 422, "image is 1; it must be a string."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_malformed_body_is_answered_in_one_sentence(
    client: httpx2.Client, content: bytes, status: int, start: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/generate", content=content, headers=headers)
    assert message_of(answer, status).startswith(start)


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data", "", "text/json"])
def test_a_body_must_be_declared_as_json(client: httpx2.Client, content_type: str) -> None:
    answer = client.post(
        "/v1/generate", content=b'{"prompt": "x"}', headers={"content-type": content_type}
    )
    assert "must be application/json" in message_of(answer, 415)


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/no", 404), ("GET", "/v1/generate", 405)]
)
def test_a_wrong_path_or_method_has_the_same_shape(
    client: httpx2.Client, method: str, path: str, status: int
) -> None:
    assert path in message_of(client.request(method, path), status)

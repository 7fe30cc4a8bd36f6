"""Options of a command as fields of a request."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from server.errors import InvalidRequest
from server.request_options import fields_set, guidance_of, hires_of, named, pictured
from server.requests.catalog import catalog
from server.requests.schema import GenerateRequest

PROMPT = "a red circle"


def guidance_in(written: Any) -> Any:
    return GenerateRequest.model_validate({"prompt": PROMPT, "guidance": written}).guidance


@pytest.mark.parametrize("options", [{"policy": "reuse"}, {"scale": 6.0}], ids=list)
# The second uses statistics of plain guidance, which is therefore its default.
@pytest.mark.parametrize("sampler", ["unipc", "dpm_solver_v3"])
def test_scale_and_policy_change_the_guidance_of_a_request_that_names_none(
    sampler: str, options: dict[str, Any]
) -> None:
    defaults = catalog().defaults
    silent = defaults.guidance_by_sampler.get(sampler, defaults.guidance)
    made = guidance_of(sampler, None, options.get("scale"), options.get("policy"))
    assert guidance_in(made) == guidance_in(silent | options)


def test_a_picture_is_named_with_what_reads_it(tmp_path: Path) -> None:
    file, odd = tmp_path / "edges.png", tmp_path / "edges.png:2"
    file.write_bytes(b"edges")
    canny = {"name": "canny", "image": base64.b64encode(b"edges").decode()}
    assert pictured("--control", f"canny={file}") == canny
    assert pictured("--control", f"canny={file}:0.5") == canny | {"scale": 0.5}
    written = json.dumps({"name": "canny", "image": str(file), "end": 0.5})
    assert pictured("--control", written) == canny | {"end": 0.5}
    several = json.dumps({"name": "style", "image": [str(file)] * 2, "mask": str(file)})
    style = {"name": "style", "image": [canny["image"]] * 2, "mask": canny["image"]}
    assert pictured("--image-prompt", several) == style
    odd.write_bytes(b"edges")
    assert pictured("--control", f"canny={odd}") == canny
    for text, words in {
        "canny": "must be NAME=FILE, NAME=FILE:SCALE or a JSON object",
        f"canny={tmp_path}": "is not a file",
        '{"name": "canny"}': "its `image` must name a file",
        f'{{"image": "{file}", "mask": 1}}': "its `mask` must name a file",
    }.items():
        with pytest.raises(InvalidRequest, match=words):
            pictured("--control", text)


def test_any_field_is_set_by_its_name_once() -> None:
    variation = '{"seed": 3, "strength": 0.2}'
    made = fields_set(
        [f"variation={variation}", "prompt_syntax=automatic1111", "noise_size=null"],
        {"prompt": PROMPT, "steps": None},
    )
    assert made == {
        "prompt": PROMPT,
        "variation": json.loads(variation),
        "prompt_syntax": "automatic1111",
        "noise_size": None,
    }
    for text, words in {
        "prompt=x": "prompt, which was given before",
        "stream=true": "stream, which only a server does",
        "steps": "must be FIELD=VALUE",
    }.items():
        with pytest.raises(InvalidRequest, match=words):
            fields_set([text], {"prompt": PROMPT})


def test_json_that_python_does_not_read_is_none() -> None:
    digits, deep = "9" * 5000, "[" * 100_000
    assert fields_set([f"seed={digits}", f"adapters={deep}"], {}) == {
        "seed": digits,
        "adapters": deep,
    }
    for text in (f'{{"eta": {digits}}}', f'{{"eta": {deep}'):
        with pytest.raises(InvalidRequest, match="is not valid JSON"):
            named(text)


def test_a_second_run_is_asked_for_by_its_factor() -> None:
    assert hires_of("1.5") == {"scale": 1.5}
    assert hires_of('{"width": 96, "height": 64}') == {"width": 96, "height": 64}
    with pytest.raises(InvalidRequest, match="must be a factor"):
        hires_of("twice")

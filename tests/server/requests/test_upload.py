"""Pictures are taken out of a request's JSON, and put back in their places."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.requests.messages import explain
from server.requests.schema import GenerateRequest
from server.requests.upload import Upload, put_upload, uploads_in, without_uploads


def test_pictures_of_a_list_are_put_back_in_their_places() -> None:
    sent = {"prompt": "x", "image": "a", "reference_images": ["b", "c"]}
    given = {"prompt": "x", "image": Upload("a"), "reference_images": [Upload("b"), Upload("c")]}
    request = GenerateRequest.model_validate(given)
    fields: dict[str, Any] = without_uploads(given)
    for path, upload in uploads_in(request):
        with upload.opened() as data:
            put_upload(fields, path, str(data))
    assert fields == sent


def test_a_single_picture_is_put_back_where_there_may_be_a_list() -> None:
    names = [{"name": "x"}, {"name": "y"}]
    sent = [[Upload("a"), Upload("b")], Upload("c")]
    prompts = [name | {"image": image} for name, image in zip(names, sent, strict=True)]
    given = {"prompt": "x", "image_prompts": prompts}
    request = GenerateRequest.model_validate(given)
    fields: dict[str, Any] = without_uploads(given)
    for path, upload in uploads_in(request):
        with upload.opened() as data:
            put_upload(fields, path, str(data))
    assert [one["image"] for one in fields["image_prompts"]] == [["a", "b"], ["c"]]


def test_a_picture_where_a_list_must_be_is_named_as_one() -> None:
    with pytest.raises(ValidationError) as refused:
        GenerateRequest.model_validate({"prompt": "x", "reference_images": Upload("a")})
    said = explain(refused.value.errors(), GenerateRequest).message
    assert said == "reference_images is a picture; it must be a list."

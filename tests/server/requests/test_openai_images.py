"""Requests of OpenAI's clients, translated to ours."""

from __future__ import annotations

from server.requests.openai_images import ImageGeneration, request_of


def test_a_name_of_openai_s_means_the_default_model_unless_one_is_hosted_under_it() -> None:
    body = ImageGeneration(prompt="a red circle", model="gpt-image-1")
    request, [note] = request_of(body, lambda _: False)
    assert request.model is None
    assert "the default model is used instead" in note
    request, notes = request_of(body, lambda name: name == "gpt-image-1")
    assert (request.model, notes) == ("gpt-image-1", ())

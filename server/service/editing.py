"""Image editing in the way that a model supports: by reference images, or a run from the image."""

from __future__ import annotations

from server.errors import InvalidRequest
from server.models.hosted import ModelFacts
from server.requests.schema import GenerateRequest

__all__ = ["as_edit"]


def as_edit(request: GenerateRequest, facts: ModelFacts) -> GenerateRequest:
    """Return the request with its image moved to the reference images, if the model reads these.

    A mask or a strength asks for a run that starts from the image, which every model supports.

    Args:
        request: request as sent; it is returned unchanged unless it is read as an edit.
        facts: facts of the model that will serve it.

    Raises:
        InvalidRequest: there are several images, but the model or the run reads only one.
    """
    if not request.reading.edits or request.image is None:
        return request
    starts = request.mask is not None or request.strength is not None
    if facts.references and not starts:
        references = request.reference_images or (request.image,)
        return request.model_copy(update={"image": None, "reference_images": references})
    if count := len(request.reference_images):
        why = f"model {facts.name!r} edits one at a time"
        if facts.references:
            why = "with a mask, a strength or transparent pixels, one is edited at a time"
        raise InvalidRequest("image", f"image has {count} images; {why}.")
    return request

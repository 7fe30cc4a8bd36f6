"""What requests may ask of a model's classifier, and the errors for everything else."""

from collections.abc import Iterator
from typing import Any

import pytest

from embedded import MODEL_FOLDER
from samplers.ddim import DDIM
from server.errors import InvalidRequest
from server.models.classifier import LatentClassifier
from server.models.hosted import HostedModel
from server.models.loading import load_model
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest, ResolvedRequest
from server.settings import Limits

HEADS = {"shape": ("circle", "star"), "colour": ("red", "green", "blue")}
STEPS = 4


@pytest.fixture(scope="module")
def hosted() -> HostedModel:
    return load_model(MODEL_FOLDER, name="embedded", device="cpu", dtype="float32")


@pytest.fixture
def model(hosted: HostedModel) -> Iterator[HostedModel]:
    """The embedded model with a classifier that has fewer attributes than its own."""
    kept = hosted.classifier
    channels = hosted.facts.latent_channels
    hosted.classifier = LatentClassifier(channels, HEADS, hosted.facts.denoiser)
    yield hosted
    hosted.classifier = kept


def resolved(model: HostedModel, prompt: str = "a red star", **classifier: Any) -> ResolvedRequest:
    guidance = {"name": "cfg", "classifier": classifier} if classifier else {"name": "cfg"}
    request = GenerateRequest.model_validate(
        {"prompt": prompt, "steps": STEPS, "guidance": guidance, "spacing": "trailing"}
    )
    return resolve(request, model, Limits(), None)


def plan_of(model: HostedModel, request: ResolvedRequest) -> Any:
    return make_plan(model.default_schedule, DDIM(), request.spacing, request.steps, None)


@pytest.mark.parametrize(
    ("classifier", "field", "sentence"),
    [
        (
            {"name": "elucd"},
            "guidance.classifier.target",
            "guidance.classifier.target is empty; 'elucd' needs a class for at least one of: "
            "shape, colour.",
        ),
        (
            {"name": "elucd", "target": {"mood": "gay"}},
            "guidance.classifier.target",
            "guidance.classifier.target names 'mood'; the classifier of model 'embedded' has: "
            "shape, colour.",
        ),
        (
            {"name": "gradient_free", "target": {"colour": "mauve"}},
            "guidance.classifier.target.colour",
            "guidance.classifier.target.colour is 'mauve'; the classifier of model 'embedded' "
            "has: red, green, blue.",
        ),
        (
            {"name": "gradient_free", "target": {"shape": "circle"}},
            "guidance.classifier.target",
            "guidance.classifier.target.shape is 'circle', which the prompt does not contain; "
            "gradient_free replaces that word, so only words of the prompt are allowed.",
        ),
        (
            {"name": "minority"},
            "guidance.classifier.target",
            "guidance.classifier.target names 'minority'; the classifier of model 'embedded' "
            "has: shape, colour.",
        ),
    ],
)
def test_what_the_classifier_cannot_see_is_refused(
    model: HostedModel, classifier: dict[str, Any], field: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        resolved(model, **classifier)
    assert (refusal.value.field, str(refusal.value)) == (field, sentence)


def test_a_model_without_a_classifier_says_so(model: HostedModel) -> None:
    model.classifier, kept = None, model.classifier_lacks
    model.classifier_lacks = "its folder has no weft/classifier.safetensors"
    with pytest.raises(InvalidRequest) as refusal:
        resolved(model, name="elucd", target={"shape": "star"})
    model.classifier_lacks = kept
    assert str(refusal.value) == (
        "guidance.classifier is 'elucd', but model 'embedded' has no classifier: its folder has "
        "no weft/classifier.safetensors; leave guidance.classifier out."
    )


def test_a_window_that_holds_no_step_is_refused(model: HostedModel) -> None:
    request = resolved(model, name="elucd", target={"shape": "star"}, start=0.1, stop=0.2)
    with pytest.raises(
        InvalidRequest, match=r"guidance\.classifier: none of the 4 steps lies within"
    ):
        prepare(request, model, plan_of(model, request))


def test_alternatives_too_long_for_the_model_are_refused(model: HostedModel) -> None:
    longest = model.facts.max_tokens
    long_name = " ".join(["blue"] * longest)
    model.classifier = LatentClassifier(
        model.facts.latent_channels, {"colour": ("red", long_name)}, "x"
    )
    with pytest.raises(InvalidRequest, match=r"guidance\.classifier has \d+ tokens"):
        resolved(model, name="gradient_free", target={"colour": "red"})

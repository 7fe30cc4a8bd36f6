"""Prompts in a chat template, which Qwen2.5-VL encodes together with reference images."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import torch

from server.models.chat_text import TEXT
from server.models.conditioning import Conditioning
from server.models.folder import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from server.models.references import SeenPicture
    from server.models.text_options import TextOptions

__all__ = ["PicturedTemplate", "PicturedText", "load_picture_processor"]

PAD: Final = "<|image_pad|>"
"""Placeholder token for the features of an image, one for each feature."""

PROCESSOR: Final = "processor/preprocessor_config.json"
JOINT: Final = "processor/processor_config.json"
"""The same in folders saved by transformers 5, together with other settings of the processor."""


@dataclass(frozen=True, slots=True)
class PicturedTemplate:
    """Text around a prompt and its images.

    Attributes:
        head: text before the images.
        picture: text for each image, in which ``{number}`` is replaced and which contains ``PAD``
            once.
        tail: text after the prompt.
        places: maximum number of tokens of a prompt, including the template, without images.
        dropped: number of tokens at the beginning that the denoiser does not read.
    """

    head: str
    picture: str
    tail: str
    places: int
    dropped: int


class PicturedText:
    """Encodes each prompt together with its images, at its own length.

    Args:
        encoder: a ``Qwen2_5_VLModel``, on its device.
        tokenizer: tokenizer of the encoder.
        processor: image processor of the encoder, from transformers.
        template: template around every prompt.
        device: device of the encoder.
        unconditional: prompt that stands for the unconditional.
    """

    def __init__(
        self,
        encoder: Any,
        tokenizer: Any,
        processor: Any,
        template: PicturedTemplate,
        device: torch.device,
        unconditional: str,
    ) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._processor = processor
        self._template = template
        self._device = device
        self._unconditional = unconditional
        # A fast tokenizer raises an error if two threads use it at once.
        self._tokenizing = Lock()
        self._pad = tokenizer.convert_tokens_to_ids(PAD)
        self._markers = len(self._tokens("", ()))

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a prompt, excluding the template and images."""
        return self._template.places - self._markers

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a prompt, excluding the template; safe from any thread."""
        return len(self._tokens(text, ())) - self._markers

    def encode(
        self, prompts: Sequence[str | None], width: int, height: int, options: TextOptions
    ) -> list[Conditioning]:
        """Conditioning of each prompt, together with the images in ``options``."""
        seen = self._looked_at(options.pictures)
        # One by one: nothing is wasted on padding, and no bit depends on the other prompts.
        # Duplicates, which fill up a batch of fixed size, are encoded only once.
        made = {
            prompt: self._encoded(self._unconditional if prompt is None else prompt, *seen)
            for prompt in dict.fromkeys(prompts)
        }
        return [made[prompt] for prompt in prompts]

    def modules(self) -> Mapping[str, nn.Module]:
        """The text encoder by its name in a model folder."""
        return {"text_encoder": self._encoder}

    def _looked_at(
        self, pictures: Sequence[SeenPicture]
    ) -> tuple[tuple[int, ...], dict[str, Tensor]]:
        """Number of features of each image, and the encoder's inputs for all of them."""
        if not pictures:
            return (), {}
        made = self._processor([one.pixels for one in pictures], return_tensors="pt")
        merged = self._processor.merge_size**2
        counts = tuple(int(patches) // merged for patches in made.image_grid_thw.prod(-1))
        return counts, {
            name: made[name].to(self._device) for name in ("pixel_values", "image_grid_thw")
        }

    def _encoded(
        self, prompt: str, features: tuple[int, ...], pictures: Mapping[str, Tensor]
    ) -> Conditioning:
        tokens = torch.tensor([self._tokens(prompt, features)], device=self._device)
        # Given the token types, the encoder assigns images 2D positions, as in its training.
        kinds = {"mm_token_type_ids": (tokens == self._pad).int()} if pictures else {}
        states = self._encoder(tokens, **pictures, **kinds, use_cache=False).last_hidden_state
        text = states[0, self._template.dropped :].clone()
        return Conditioning({TEXT: text}, len(text))

    def _tokens(self, prompt: str, features: tuple[int, ...]) -> list[int]:
        said, template = _without_pictures(prompt), self._template
        numbered = enumerate(features, start=1)
        pictures = "".join(
            template.picture.replace("{number}", str(number)).replace(PAD, PAD * count)
            for number, count in numbered
        )
        text = f"{template.head}{pictures}{said}{template.tail}"
        with self._tokenizing:
            return self._tokenizer(text, verbose=False).input_ids


def _without_pictures(prompt: str) -> str:
    """Remove image placeholders from a prompt."""
    # Removing a token may join the text around it to another one.
    while PAD in prompt:
        prompt = prompt.replace(PAD, "")
    return prompt


def load_picture_processor(folder: Path) -> Any:
    """The image processor of a model folder, for which only its config is read.

    Raises:
        ModelMismatch: there is no such config, or it is not valid JSON.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    own = (folder / PROCESSOR).exists()
    config = read_json(folder, PROCESSOR if own else JOINT)
    config = config if own else config.get("image_processor", {})
    allowed = {"size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std"}
    given = {name: value for name, value in config.items() if name in allowed}
    if "size" not in given and "max_pixels" in config:
        edges = "shortest_edge", "longest_edge"
        limits = config.get("min_pixels", 56 * 56), config["max_pixels"]
        given["size"] = dict(zip(edges, limits, strict=True))
    return Qwen2VLImageProcessorPil(**given)

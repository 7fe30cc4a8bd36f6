"""Calls of a model's autoencoder, replayed from CUDA graphs where they are recorded.

A frame of a live stream has one call of the encoder and one of the decoder, of about a hundred
operations each. While the engine's thread launches them from Python it can launch no forward pass,
and a small autoencoder takes less time than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import torch

from server.engine.decoder_stream import on_decoder_stream
from server.engine.graphs import Graphs
from server.engine.tick.decode import DECODED_AT_ONCE, PIXELS_AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from server.engine.graphs import Recorder
    from server.models.hosted import HostedModel

__all__ = ["AutoencoderCalls"]


@dataclass(frozen=True, slots=True)
class Half:
    """The encoder or the decoder of an autoencoder, whose calls read one tensor.

    Attributes:
        subject: which of them.
    """

    subject: Literal["encoder", "decoder"]

    @property
    def alive(self) -> bool:
        """It refers to nothing but the model."""
        return True

    @property
    def kind(self) -> str:
        """Rows are given nothing but the tensor."""
        return ""

    def evaluate(self, model: HostedModel, tensors: Mapping[str, Tensor]) -> Tensor:
        """See ``HostedModel.encode_image`` and ``HostedModel.decode``."""
        call = model.encode_image if self.subject == "encoder" else model.decode
        return call(tensors["x"])


@dataclass(slots=True)
class Pace:
    """What the calls of a half take.

    Attributes:
        seconds_a_pixel: of the pictures, at most; infinite until one has been timed.
    """

    seconds_a_pixel: float = inf


@dataclass(frozen=True, slots=True)
class PictureCost:
    """What calls take with pictures of one size.

    Attributes:
        pixels: of a picture.
        pace: of the half.
    """

    pixels: int
    pace: Pace

    def seconds(self, rows: int) -> float:
        """Expected of a call with so many pictures, at most."""
        return rows * self.pixels * self.pace.seconds_a_pixel

    def correct(self, rows: int, seconds: float) -> None:
        """Nothing but the recordings goes by these costs."""


class AutoencoderCalls:
    """The calls of one model's autoencoder, as ``HostedModel`` has them.

    A recording must equal its call to the bit. Calls with more pixels than come beside ticks are
    not recorded: they keep a GPU busy by themselves, and a recording would hold much memory.

    Args:
        model: whose autoencoder.
        recorder_of: makes what records calls; None where they are not recorded.
        room: bytes that recordings may take, beside what they hold.
    """

    def __init__(
        self,
        model: HostedModel,
        recorder_of: Callable[[HostedModel], Recorder] | None = None,
        room: Callable[[], float] = lambda: inf,
    ) -> None:
        self.graphs: tuple[Graphs, ...] = ()
        self._model = model
        self._paces = {"encoder": Pace(), "decoder": Pace()}
        if recorder_of is not None:
            # Each has memory of its own: they run at the same time, the encoder between forward
            # passes and the decoder beside them.
            within = partial(on_decoder_stream, model.device)
            self.graphs = (
                Graphs(model, recorder_of(model), room, exact=True),
                Graphs(model, recorder_of(model), room, exact=True, within=within),
            )

    def encode(self, pixels: Tensor) -> Tensor:
        """See ``HostedModel.encode_image``."""
        return self._called(Half("encoder"), pixels, scale=1)

    def decode(self, latents: Tensor) -> Tensor:
        """See ``HostedModel.decode``; on CUDA it must be called on the decoder's stream."""
        return self._called(Half("decoder"), latents, scale=self._model.facts.latent_scale)

    def first_calls(self) -> Iterator[Callable[[], object]]:
        """Calls at the model's own size with the numbers of pictures that come in ticks.

        Each should be made once in the thread that runs the ticks, as torch keeps a thread's
        choices of kernels for itself.
        """
        facts = self._model.facts
        pixels = facts.default_width * facts.default_height
        shape = 3, facts.default_height, facts.default_width
        calls = (
            ("decoder", self.decode, self._model.default_shape),
            ("encoder", self.encode, shape),
        )
        for pictures in range(1, max(1, min(DECODED_AT_ONCE, PIXELS_AT_ONCE // pixels)) + 1):
            for name, call, size in calls:
                yield partial(self._timed, self._paces[name], call, (pictures, *size), pixels)

    def _called(self, half: Half, given: Tensor, scale: int) -> Tensor:
        pixels = given.shape[-1] * given.shape[-2] * scale**2
        if self.graphs and len(given) * pixels <= PIXELS_AT_ONCE:
            graphs = self.graphs[0 if half.subject == "encoder" else 1]
            cost = PictureCost(pixels, self._paces[half.subject])
            replayed = graphs.replayed({"x": given}, half, cost)
            if replayed is not None:
                return replayed
        return half.evaluate(self._model, {"x": given})

    def _timed(
        self, pace: Pace, call: Callable[[Tensor], Tensor], shape: tuple[int, ...], pixels: int
    ) -> None:
        # Numbers of which none is like another: with equal ones a recording that has kept them
        # would seem to be right.
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        given = drawn.to(self._model.device)
        began = perf_counter()
        # Reading one number waits for the device.
        call(given).flatten()[0].item()
        seconds = perf_counter() - began
        pace.seconds_a_pixel = min(pace.seconds_a_pixel, seconds / (shape[0] * pixels))

"""Calls of a model's autoencoder, replayed from CUDA graphs where they are recorded.

A frame of a live stream takes one call of the encoder and one of the decoder, of about a hundred
operations each. While the engine's thread launches these from Python it cannot launch a forward
pass, and launching takes longer than a small autoencoder runs.
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
from server.engine.tick.decode import DECODER_BATCH, MAX_DECODER_PIXELS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from server.engine.graphs import Recorder
    from server.models.hosted import HostedModel

__all__ = ["AutoencoderCalls", "Pace", "decoder_of", "encoder_of"]


def encoder_of(model: HostedModel, tiny: bool) -> Callable[[Tensor], Tensor]:
    """``HostedModel.encode_image``, or the same by the model's tiny autoencoder.

    Args:
        model: loaded model.
        tiny: whether to use the tiny one, which it then has; requests are checked for this.
    """
    return model.tiny.encode if tiny and model.tiny is not None else model.encode_image


def decoder_of(model: HostedModel, tiny: bool) -> Callable[[Tensor], Tensor]:
    """``HostedModel.decode``, or the same by the model's tiny autoencoder; see above."""
    return model.tiny.decode if tiny and model.tiny is not None else model.decode


@dataclass(frozen=True, slots=True)
class Half:
    """The encoder or the decoder of an autoencoder, whose calls read one tensor.

    Attributes:
        name: which half.
        tiny: whether it is of the model's tiny autoencoder, not of its own.
    """

    name: Literal["encoder", "decoder"]
    tiny: bool = False

    @property
    def subject(self) -> str:
        """Name of the half, of one autoencoder or the other."""
        return f"tiny {self.name}" if self.tiny else self.name

    @property
    def alive(self) -> bool:
        """Always true, since it refers to nothing but the model."""
        return True

    @property
    def kind(self) -> str:
        """Always empty, since the call reads only a tensor."""
        return ""

    def evaluate(self, model: HostedModel, tensors: Mapping[str, Tensor]) -> Tensor:
        """See :func:`encoder_of` and :func:`decoder_of`."""
        of = encoder_of if self.name == "encoder" else decoder_of
        return of(model, self.tiny)(tensors["x"])


class Pace:
    """Time of the calls of a half, from those that were timed."""

    def __init__(self) -> None:
        self._timed: dict[int, float] = {}

    def note(self, pixels: int, seconds: float) -> None:
        """Note the seconds of a call with so many pixels in all of its pictures."""
        self._timed[pixels] = min(seconds, self._timed.get(pixels, inf))

    def seconds(self, pixels: int) -> float:
        """Upper bound on the seconds of a call; infinite until one has been timed.

        Args:
            pixels: number of pixels of all its pictures. Of few, a call takes nearly as long as of
                several times as many, since it launches as many operations.
        """
        as_large = [seconds for timed, seconds in self._timed.items() if timed >= pixels]
        if as_large:
            return min(as_large)
        largest = max(self._timed, default=0)
        return self._timed[largest] * pixels / largest if largest else inf


@dataclass(frozen=True, slots=True)
class PictureCost:
    """Cost of calls with pictures of one size.

    Attributes:
        pixels: number of pixels of a picture.
        pace: time of the half's calls.
    """

    pixels: int
    pace: Pace

    def seconds(self, rows: int) -> float:
        """Upper bound on the seconds of a call, with one picture per row."""
        return self.pace.seconds(rows * self.pixels)

    def correct(self, rows: int, seconds: float) -> None:
        """Note the seconds of the first call; those of a recording say nothing about others."""
        if self.seconds(rows) == inf:
            self.pace.note(rows * self.pixels, seconds)


class AutoencoderCalls:
    """The calls of one model's autoencoders, which replace those of ``HostedModel``.

    A recording must equal its call bit for bit. Calls with more pictures or more pixels than the
    decoder takes at once while ticks run are not recorded: they keep a GPU busy without it, a
    recording would hold much memory, and an idle GPU decodes ever other numbers of pictures.

    Args:
        model: model of the autoencoder.
        recorder_of: function that makes the recorders of its calls; None to record none.
        room: function that returns the bytes that recordings may take in addition to what they
            hold.
        fixed: whether every call has ``DECODER_BATCH`` pictures.
    """

    def __init__(
        self,
        model: HostedModel,
        recorder_of: Callable[[HostedModel], Recorder] | None = None,
        room: Callable[[], float] = lambda: inf,
        *,
        fixed: bool = False,
    ) -> None:
        self.graphs: tuple[Graphs, ...] = ()
        self._fixed = fixed
        self._model = model
        both = (False,) if model.tiny is None else (False, True)
        halves = (Half(name, tiny) for tiny in both for name in ("decoder", "encoder"))
        self._paces = {half: Pace() for half in halves}
        if recorder_of is not None:
            # Each has its own memory, since they run at the same time: the encoder between forward
            # passes, and the decoder concurrently with them.
            within = partial(on_decoder_stream, model.device)
            self.graphs = (
                Graphs(model, recorder_of(model), room, exact=True),
                Graphs(model, recorder_of(model), room, exact=True, within=within),
            )

    def encode(self, pixels: Tensor, *, tiny: bool = False) -> Tensor:
        """See :func:`encoder_of`."""
        return self._called(Half("encoder", tiny), pixels)

    def decode(self, latents: Tensor, *, tiny: bool = False) -> Tensor:
        """See :func:`decoder_of`; on CUDA it must be called on the decoder's stream."""
        return self._called(Half("decoder", tiny), latents)

    def first_calls(self) -> Iterator[Callable[[], object]]:
        """Yield calls at the model's default size, for each number of pictures that ticks may have.

        Each should be made once in the thread that runs the ticks, since torch keeps its choices of
        kernels per thread.
        """
        facts = self._model.facts
        pixels = facts.default_width * facts.default_height
        shape = 3, facts.default_height, facts.default_width
        sizes = {"decoder": self._model.default_shape, "encoder": shape}
        max_pictures = max(1, min(DECODER_BATCH, MAX_DECODER_PIXELS // pixels))
        for pictures in (DECODER_BATCH,) if self._fixed else range(1, max_pictures + 1):
            for half in self._paces:
                yield partial(self._timed, half, (pictures, *sizes[half.name]), pixels)

    def _called(self, half: Half, given: Tensor) -> Tensor:
        scale = 1 if half.name == "encoder" else self._model.facts.latent_scale
        pixels = given.shape[-1] * given.shape[-2] * scale**2
        beside_ticks = len(given) <= DECODER_BATCH and len(given) * pixels <= MAX_DECODER_PIXELS
        if self.graphs and beside_ticks:
            graphs = self.graphs[0 if half.name == "encoder" else 1]
            cost = PictureCost(pixels, self._paces[half])
            replayed = graphs.replayed({"x": given}, half, cost)
            if replayed is not None:
                return replayed
        return half.evaluate(self._model, {"x": given})

    def _timed(self, half: Half, shape: tuple[int, ...], pixels: int) -> None:
        # Random numbers: with equal ones, a recording that wrongly kept its inputs would still pass
        # the comparison.
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        given = drawn.to(self._model.device)
        # The first call of a size takes longer, since libraries choose its kernels.
        for _ in range(2):
            began = perf_counter()
            # Reading one number waits for the device.
            self._called(half, given).flatten()[0].item()
            self._paces[half].note(shape[0] * pixels, perf_counter() - began)

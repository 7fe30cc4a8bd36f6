"""Per-row changes inside a network, which leave the other rows of a forward pass unchanged.

The hooks read the changes as tensors over the rows, so that plain, perturbed and skip-tuned rows
share one forward pass. A hook that no row needs costs one dictionary lookup.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from guidance.edits import (
    ApartFrom,
    BackboneScales,
    BlurredQueries,
    IdentityAttention,
    NormalizedAttention,
    SkippedBlocks,
    SkipScales,
)
from server.models.edit_values import EditPlaces, EditValues

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from torch import Tensor, nn

    from guidance.edits import Edit

MIDDLE = "middle"
"""Layer name for the mid block of a U-Net, and for the middle one of a transformer's blocks."""

BLOCKS = (
    "BasicTransformerBlock",
    "Flux2SingleTransformerBlock",
    "Flux2TransformerBlock",
    "FluxSingleTransformerBlock",
    "FluxTransformerBlock",
    "JointTransformerBlock",
    "SanaTransformerBlock",
    "QwenImageTransformerBlock",
    "ZImageTransformerBlock",
)
"""Classes of blocks that can be skipped; the first one's self-attention can be edited as well."""

STAGES = 2
"""Number of stages of a U-Net's decoder that FreeU changes."""

PROJECTIONS = ("encoder_hid_proj", "caption_projection")
"""Parts of a network that project the text before its blocks read it."""


class RowEdits:
    """The hooks of one network, and the state that they read.

    Args:
        network: a diffusers U-Net or transformer.
    """

    def __init__(self, network: nn.Module) -> None:
        self._tensors: dict[tuple[type[Edit], str], Tensor] = {}
        self._apart: dict[str, list[tuple[int, ApartFrom]]] = {}
        self._against: Tensor | None = None
        self._attended: Tensor | None = None
        self._attending_aside = False
        self._latent_size = (1, 1)
        self._blocks = {
            name: module
            for name, module in network.named_modules()
            if type(module).__name__ in BLOCKS
        }
        for name, block in self._blocks.items():
            self._hook_block(name, block)
        # If the network projects the text first, a block never sees the original text embeddings.
        projects = any(getattr(network, part, None) is not None for part in PROJECTIONS)
        crossing = [getattr(block, "attn2", None) for block in self._blocks.values()]
        self._crossing = [] if projects else [one for one in crossing if one is not None]
        for attention in self._crossing:
            self._hook_cross_attention(attention)
        up_blocks = [
            block
            for name, block in network.named_children()
            if name == "up_blocks"
            for block in block.children()
        ]
        self._skips = [len(_resnets(block)) for block in up_blocks]
        for number, block in enumerate(up_blocks):
            self._hook_skips(number, block)
        if up_blocks:
            parts = dict(network.named_children())
            # Some small U-Nets have no mid block.
            bottom = parts.get("mid_block") or list(parts["down_blocks"].children())[-1]
            below = zip([bottom, *up_blocks], up_blocks[:STAGES], strict=False)
            for stage, (before, block) in enumerate(below):
                self._hook_backbone(stage, before, block)

    def layers(self) -> tuple[str, ...]:
        """Names of the blocks that edits may refer to, in the network's order."""
        return tuple(self._blocks)

    def refuses(self, edit: Edit) -> str | None:
        """Why this network does not support the edit, as a clause; None where it does."""
        if isinstance(edit, SkipScales | BackboneScales):
            return None if self._skips else "has no skip connections to scale"
        if isinstance(edit, NormalizedAttention):
            return None if self._crossing else "has no cross-attention that reads the text itself"
        if not isinstance(edit, IdentityAttention | BlurredQueries | SkippedBlocks | ApartFrom):
            return "has no weaker companion; start the server with one"
        for layer in edit.layers:
            named = self._named(layer)
            if not named:
                listed = ", ".join((MIDDLE, *self._blocks)) if self._blocks else "none"
                return f"has no layer {layer[:80]!r}; it has {listed}"
            whole = [name for name in named if not hasattr(self._blocks[name], "attn1")]
            if whole and not isinstance(edit, SkippedBlocks):
                return f"has no plain self-attention in layer {whole[0]!r}"
        return None

    def values(self, edits: Sequence[tuple[Edit, ...]], device: torch.device) -> EditValues | None:
        """The edits of a forward pass's rows as tensors on the device.

        Args:
            edits: edits of each row, in order; none of them may be refused.
            device: device of the network.

        Returns:
            None where no row has any.
        """
        if not any(edits):
            return None
        rows: dict[tuple[type[Edit], str], list[float]] = {}
        for row, own in enumerate(edits):
            for edit in own:
                for place, value in self._values(edit):
                    untouched = float(isinstance(edit, SkipScales | BackboneScales))
                    values = rows.setdefault((type(edit), place), [untouched] * len(edits))
                    values[row] = value
        # In an order independent of the rows, so that more forward passes have the same form.
        numbered = sorted(rows, key=lambda key: (key[0].__name__, key[1]))
        numbers = torch.tensor([rows[key] for key in numbered], dtype=torch.float32)
        numbers = numbers.view(-1, len(edits))
        places = EditPlaces(tuple(numbered), tuple(self._apart_of(edits)))
        return EditValues(places, numbers.mT.contiguous().to(device, non_blocking=True))

    @contextmanager
    def applied(
        self,
        edits: Sequence[tuple[Edit, ...]] | EditValues,
        x: Tensor,
        against: Tensor | None = None,
    ) -> Generator[None]:
        """Apply the edits of each row in the forward pass inside the ``with`` block.

        Args:
            edits: edits of each row, in order, none of which may be refused; or the result of
                :meth:`values`.
            x: input of the network, ``[rows, C, h, w]``.
            against: a second text of each row, ``[rows, tokens, features]``, where any row's
                attention is guided away from it.
        """
        self._latent_size = (x.shape[-2], x.shape[-1])
        made = edits if isinstance(edits, EditValues) else self.values(edits, x.device)
        if made is not None:
            self._tensors = dict(zip(made.places.numbers, made.numbers.unbind(1), strict=True))
            for name, row, edit in made.places.apart:
                self._apart.setdefault(name, []).append((row, edit))
        led_away = (NormalizedAttention, "alpha") in self._tensors
        self._against = against if led_away else None
        try:
            yield
        finally:
            self._tensors, self._apart = {}, {}
            self._against, self._attended = None, None

    def _apart_of(self, edits: Sequence[tuple[Edit, ...]]) -> Iterator[tuple[str, int, ApartFrom]]:
        """The rows that move away from others, with the names of the blocks in which they do."""
        for row, own in enumerate(edits):
            for edit in own:
                if isinstance(edit, ApartFrom) and edit.reference is not None:
                    named = {name: None for layer in edit.layers for name in self._named(layer)}
                    yield from ((name, row, edit) for name in named)

    def _values(self, edit: Edit) -> Iterator[tuple[str, float]]:
        """Each place where the edit acts, with the number that the hook there reads."""
        match edit:
            case SkipScales(scales):
                count = sum(self._skips)
                known = np.linspace(0, 1, len(scales))
                factors = np.interp(np.linspace(0, 1, count), known, scales)
                yield from ((str(number), float(f)) for number, f in enumerate(factors))
            case BackboneScales(backbone, skips):
                yield from ((f"backbone {i}", factor) for i, factor in enumerate(backbone))
                yield from ((f"skips {i}", factor) for i, factor in enumerate(skips))
            case BlurredQueries(layers, sigma):
                yield from ((name, sigma) for layer in layers for name in self._named(layer))
            case IdentityAttention(layers) | SkippedBlocks(layers):
                yield from ((name, 1.0) for layer in layers for name in self._named(layer))
            case NormalizedAttention(scale, tau, alpha):
                yield from (("scale", scale), ("tau", tau), ("alpha", alpha))
            case ApartFrom():
                # It has no number per row, as it reads another row.
                return
            case _:
                raise ValueError(f"{type(edit).__name__} changes no row inside the network.")

    def _named(self, layer: str) -> list[str]:
        if layer == MIDDLE:
            names = [name for name in self._blocks if name.startswith("mid_block.")]
            return names or list(self._blocks)[len(self._blocks) // 2 :][:1]
        return [name for name in self._blocks if f"{name}.".startswith(f"{layer}.")]

    def _hook_block(self, name: str, block: nn.Module) -> None:
        def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            skipped = self._tensors.get((SkippedBlocks, name))
            if skipped is None:
                return output
            hidden = args[0] if args else kwargs["hidden_states"]
            if not isinstance(output, tuple):
                return hidden.where(_over_rows(skipped > 0, hidden), output)
            # A joint block returns the prompt's tokens first, and None after the last block.
            text_states, moved = output
            if text_states is not None:
                before = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
                text_states = before.where(_over_rows(skipped > 0, text_states), text_states)
            return text_states, hidden.where(_over_rows(skipped > 0, moved), moved)

        block.register_forward_hook(skip, with_kwargs=True)
        if hasattr(block, "attn1"):
            self._hook_self_attention(name, block.get_submodule("attn1"))
            self._hook_outputs(name, [block.get_submodule("attn1"), getattr(block, "attn2", None)])

    def _hook_self_attention(self, name: str, attention: nn.Module) -> None:
        def pass_values(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            chosen = self._tensors.get((IdentityAttention, name))
            if chosen is None:
                return output
            hidden = args[0] if args else kwargs["hidden_states"]
            values = module.to_out[0](module.to_v(hidden))
            return values.where(_over_rows(chosen > 0, output), output)

        def blur(_: nn.Module, __: tuple[Any, ...], queries: Tensor) -> Tensor:
            sigmas = self._tensors.get((BlurredQueries, name))
            if sigmas is None:
                return queries
            return _blurred(queries, sigmas, self._latent_size)

        attention.register_forward_hook(pass_values, with_kwargs=True)
        attention.get_submodule("to_q").register_forward_hook(blur)

    def _hook_cross_attention(self, attention: nn.Module) -> None:
        def attend_aside(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._against is None or kwargs.get("encoder_hidden_states") is None:
                return
            # For all rows, so that a row's bits do not depend on how many others are guided.
            self._attending_aside = True
            try:
                module.forward(*args, **kwargs | {"encoder_hidden_states": self._against})
            finally:
                self._attending_aside = False

        def lead_away(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
            if self._attending_aside:
                [self._attended] = args
            elif self._attended is not None:
                away, self._attended = self._attended, None
                values = (
                    self._tensors[NormalizedAttention, of] for of in ("scale", "tau", "alpha")
                )
                return (_led_away(args[0], away, *values),)
            return None

        attention.register_forward_pre_hook(attend_aside, with_kwargs=True)
        # Before the output projection, whose bias is not part of the attention output.
        attention.get_submodule("to_out.0").register_forward_pre_hook(lead_away)

    def _hook_outputs(self, name: str, attentions: Sequence[nn.Module | None]) -> None:
        def move_apart(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            moving = self._apart.get(name)
            if moving is None:
                return output
            moved = output.clone()
            # One row at a time, so that its bits do not depend on how many others move.
            for row, edit in moving:
                moved[row] = _away(output[row], output[edit.reference], edit)
            return moved

        for attention in attentions:
            if attention is not None:
                attention.register_forward_hook(move_apart)

    def _hook_skips(self, number: int, block: nn.Module) -> None:
        first = sum(self._skips[:number])

        def scale(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if (SkipScales, "0") not in self._tensors:
                return None
            skips = kwargs["res_hidden_states_tuple"]
            # The block takes its skip connections from the end of the tuple.
            scaled = [
                skip * _over_rows(self._tensors[SkipScales, str(first + i)], skip).to(skip.dtype)
                for i, skip in enumerate(reversed(skips))
            ]
            return args, kwargs | {"res_hidden_states_tuple": tuple(reversed(scaled))}

        block.register_forward_pre_hook(scale, with_kwargs=True)

    def _hook_backbone(self, stage: int, before: nn.Module, block: nn.Module) -> None:
        resnets = _resnets(block)

        def hook(resnet: nn.Module, width: int) -> None:
            """Hook a block whose input is a backbone of this width, then a skip connection."""

            def scale(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
                backbone = self._tensors.get((BackboneScales, f"backbone {stage}"))
                if backbone is None:
                    return None
                joined, skips = args[0], self._tensors[BackboneScales, f"skips {stage}"]
                scaled, rest, skip = joined.tensor_split((width // 2, width), 1)
                scaled = scaled * _over_rows(backbone, scaled).to(scaled.dtype)
                damped = _with_coarse_part(skip, skips).to(skip.dtype)
                skip = damped.where(_over_rows(skips != 1, skip), skip)
                return torch.cat([scaled, rest, skip], 1), *args[1:]

            resnet.register_forward_pre_hook(scale)

        for resnet, under in zip(resnets, [_resnets(before)[-1], *resnets], strict=False):
            hook(resnet, cast("int", under.out_channels))


def _with_coarse_part(x: Tensor, factors: Tensor) -> Tensor:
    """``[rows, C, h, w]`` with its lowest frequencies, 0 and -1 along each side, times a factor.

    It takes the real part of the inverse transform, as FreeU's code does, computed as two real
    matrix products.
    """
    down, across = (_lowest_two(side, x.device) for side in x.shape[-2:])
    whole = x.float()
    coarse = down[0] @ whole @ across[0].mT - down[1] @ whole @ across[1].mT
    return whole + (_over_rows(factors, x) - 1) * coarse


@lru_cache
def _lowest_two(side: int, device: torch.device) -> Tensor:
    """Real and imaginary part of the matrix that keeps both lowest frequencies, ``[2, n, n]``."""
    turn = 2 * np.pi / side * (np.arange(side)[:, None] - np.arange(side))
    kept = np.stack([1 + np.cos(turn), -np.sin(turn)]) / side
    # Not an inference tensor, since a forward pass may be differentiated.
    with torch.inference_mode(mode=False):
        return torch.from_numpy(kept).float().to(device)


def _resnets(block: nn.Module) -> list[nn.Module]:
    return list(block.get_submodule("resnets").children())


def _over_rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _away(tokens: Tensor, reference: Tensor, edit: ApartFrom) -> Tensor:
    """Move tokens ``[tokens, features]`` that resemble a reference token away from it."""
    cosines = F.normalize(tokens.float(), dim=-1) @ F.normalize(reference.float(), dim=-1).mT
    alike, nearest = cosines.max(-1)
    moved = tokens + edit.strength * (tokens - reference[nearest])
    return moved.where((alike > edit.threshold)[:, None], tokens)


def _led_away(attended: Tensor, away: Tensor, scale: Tensor, tau: Tensor, alpha: Tensor) -> Tensor:
    """NAG as in the authors' attention processor, over tokens ``[rows, tokens, features]``.

    Args:
        attended: attention output for the prompt, Z+.
        away: attention output for the text that is guided away from, Z-.
        scale: scale of the extrapolation, ``[rows]``.
        tau: bound on its L1 norm as a multiple of that of Z+, ``[rows]``.
        alpha: weight of the result against Z+, ``[rows]``; where it is 0, Z+ is kept bit for bit.
    """
    scale, tau, alpha = (_over_rows(values, attended) for values in (scale, tau, alpha))
    # In float32: sums over a thousand features overflow float16.
    plus, minus = attended.float(), away.float()
    guided = scale * plus - (scale - 1) * minus
    own, extrapolated = (one.abs().sum(-1, keepdim=True) for one in (plus, guided))
    shortened = (tau * own / extrapolated).clamp(max=1).where(extrapolated > 0, 1)
    blended = alpha * shortened * guided + (1 - alpha) * plus
    return blended.to(attended.dtype).where(alpha > 0, attended)


def _blurred(queries: Tensor, sigmas: Tensor, latent_size: tuple[int, int]) -> Tensor:
    """Blur queries ``[rows, tokens, features]`` over the image, with one sigma per row."""
    height, width = _grid_of(queries.shape[1], latent_size)
    picture = queries.unflatten(1, (height, width))
    down, across = (_blur_matrices(side, sigmas).to(queries.dtype) for side in (height, width))
    smooth = torch.einsum("rij,rkl,rjlf->rikf", down, across, picture).flatten(1, 2)
    return smooth.where(_over_rows(sigmas > 0, queries), queries)


def _grid_of(tokens: int, latent_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the attention's grid: the latent's, halved and rounded up repeatedly."""
    height, width = latent_size
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def _blur_matrices(side: int, sigmas: Tensor) -> Tensor:
    """Weights of a Gaussian blur along a line of cells with mirrored ends.

    As in the authors' code of SEG, the kernel ends at three sigma, or at half the side if that is
    smaller. An infinite sigma gives the mean of the line.

    Args:
        side: number of cells of the line.
        sigmas: sigma of each row, float32 ``[rows]``; where it is 0, the weights are meaningless.

    Returns:
        ``[rows, side, side]``: weights with which each cell (last dimension) contributes to each.
    """
    sigma = sigmas.where(sigmas > 0, 1).view(-1, 1, 1)
    reach = (6 * sigma).ceil().clamp(max=side).div(2, rounding_mode="floor")

    def weights(offset: Tensor) -> Tensor:
        return torch.exp(-0.5 * (offset / sigma) ** 2) * (offset.abs() <= reach)

    cells = torch.arange(side, device=sigmas.device)
    to, of = cells[:, None], cells
    # Mirrored without repeating the border cell, which therefore has only one mirror image.
    below = weights(-of - to) * (of > 0)
    above = weights(2 * (side - 1) - of - to) * (of < side - 1)
    matrix = weights(of - to) + below + above
    matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix.where(sigma.isfinite(), 1 / side)

"""Decides which blocks of a model are compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.models.compiling.compiled_blocks import Compilation, CompiledBlocks
from server.models.row_edits import BLOCKS

if TYPE_CHECKING:
    from server.models.compiling.compiled_blocks import Compiler
    from server.models.hosted import HostedModel

__all__ = ["DENOISERS", "compilation_of", "compile_blocks"]

RESNET = "ResnetBlock2D"
"""Class of a U-Net's blocks besides its attention blocks."""

DENOISERS = "unet", "transformer"
"""Names of the denoiser's folder in a model folder."""


def compile_blocks(model: HostedModel, compiler: Compiler) -> None:
    """Have the blocks of a model's denoiser compiled, if that is possible.

    Args:
        model: model, already on its device.
        compiler: compiles the programs.
    """
    placement = model.placement
    if placement.quantization != "none":
        model.runs_eager = f"its weights are quantised to {placement.quantization}"
    elif model.gguf_types:
        model.runs_eager = f"its weights are in the blocks of a GGUF file ({model.gguf_types[0]})"
    elif placement.offload == "all":
        model.runs_eager = "its denoiser is streamed from host memory"
    else:
        [network] = [own for part, own in model.modules().items() if part in DENOISERS]
        kinds = *BLOCKS, RESNET
        name = model.facts.name
        model.blocks = CompiledBlocks(name, network, kinds, model.device, compiler)


def compilation_of(model: HostedModel) -> Compilation | None:
    """Progress of a model's compilation; None if the operator has not enabled compilation."""
    if model.blocks is not None:
        return model.blocks.compilation
    return None if model.runs_eager is None else Compilation(reason=model.runs_eager)

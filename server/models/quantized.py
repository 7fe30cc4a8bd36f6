"""Quantizes weights to eight or four bits: the linear layers in a network's repeated blocks.

These hold nearly all weights of a transformer. Layers outside the blocks stay in the model's own
dtype: embeddings of tokens, patches and times, and the last norm and projection, whose errors are
not averaged out. So do norms, convolutions and the autoencoder. Layers that a file stores in
quantized blocks stay as they are. A layer computes in the model's dtype with weights that are
dequantized as it runs, so per-row additions to its output, such as adapters, work as for other
layers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from server.models.gguf.layers import BlockLinear
from server.models.quantization import MIN_FEATURES

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from server.models.quantization import Quantization

__all__ = ["layers_in_blocks", "quantize"]


def layers_in_blocks(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers to quantize, by name: those inside elements of a ``ModuleList``."""
    found: dict[str, nn.Linear] = {}
    for name, blocks in network.named_modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        for inner, layer in blocks.named_modules():
            if not isinstance(layer, nn.Linear) or isinstance(layer, BlockLinear):
                continue
            if min(layer.in_features, layer.out_features) >= MIN_FEATURES:
                found[f"{name}.{inner}"] = layer
    return found


def quantize(
    network: nn.Module, kind: Quantization, device: torch.device, home: torch.device
) -> None:
    """Quantize a network in place, one layer at a time.

    At most one layer in its full dtype is on the device at once.

    Args:
        network: network in inference mode, in host memory.
        kind: any quantization but ``none``.
        device: device on which to quantize.
        home: where the quantized layers are kept afterwards; the rest of the network stays.
    """
    one = _by_bitsandbytes if kind == "nf4" else _by_torchao(kind)
    for layer in layers_in_blocks(network).values():
        one(layer.to(device))
        layer.to(home)


def _by_torchao(kind: str) -> Callable[[nn.Linear], None]:
    torchao: Any = import_module("torchao.quantization")
    made = torchao.Int8WeightOnlyConfig if kind == "int8" else torchao.Float8WeightOnlyConfig
    # Inductor is configured by the code that compiles blocks.
    config = made(set_inductor_config=False)
    return lambda layer: torchao.quantize_(layer, config)


def _by_bitsandbytes(layer: nn.Linear) -> None:
    """Give a layer four-bit weights and a matching ``forward``.

    The layer stays the same object, to which hooks and adapters refer.
    """
    library: Any = import_module("bitsandbytes")
    target: Any = layer
    device = layer.weight.device
    # It is quantized when it is moved to a device, even to the CPU.
    whole = library.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    target.weight = weight = whole.to(device)

    def forward(x: Tensor) -> Tensor:
        return library.matmul_4bit(x, weight.t(), quant_state=weight.quant_state, bias=layer.bias)

    target.forward = forward

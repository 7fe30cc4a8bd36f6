"""Tiny ControlNets with random weights, as diffusers makes and saves them."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ControlNetModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from server.models.controls.control import Control, ControlUse
from server.models.controls.control_kind import first_misfit
from server.models.controls.shelf import ControlShelf
from server.models.hosted import HostedModel
from server.models.weight_memory import WeightMemory

ROOM = 2**26


def of_unet(unet: Any, seed: int, **config: Any) -> Any:
    """A ControlNet of a U-Net whose latents have half the sides of its pictures.

    Args:
        unet: the U-Net.
        seed: seed of the weights.
        config: entries in place of those that follow from the U-Net.
    """
    torch.manual_seed(seed)
    made = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(16, 32), load_weights_from_unet=False
    )
    made = ControlNetModel(**{**made.config, **config})
    return with_an_effect(made)


def put_depth(model: HostedModel, folder: Path) -> str:
    """A ControlNet ``depth`` of a hosted model's U-Net, in a folder of ControlNets."""
    unet: Any = model.modules()["unet"]
    widths = [16 * 2**step for step in range(model.facts.latent_scale.bit_length())]
    saved(of_unet(unet, 1, conditioning_embedding_out_channels=widths), folder, "depth")
    return "depth"


def with_an_effect(network: Any) -> Any:
    """The network, with random numbers in the layers that start as zeros."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.4)
    return network.eval().requires_grad_(requires_grad=False)


@contextmanager
def encoding_to_the_mean() -> Generator[None]:
    """Diffusers' pipelines encode pictures to the mean of the posterior instead of a sample."""
    with pytest.MonkeyPatch.context() as patch:
        posterior = DiagonalGaussianDistribution
        patch.setattr(posterior, "sample", lambda self, *_, **__: posterior.mode(self))
        yield


def saved(network: Any, folder: Path, name: str) -> Any:
    network.save_pretrained(folder / name)
    return network


def shelf_of(model: HostedModel, *folders: Path, max_bytes: int = ROOM) -> ControlShelf:
    memory = WeightMemory[Control](max_bytes, "ControlNets")
    facts, kind = model.facts, model.control_kind
    return ControlShelf(folders, facts.name, kind, memory, model.device, model.dtype)


def use(model: HostedModel, name: str, seed: int, size: tuple[int, int], **how: Any) -> ControlUse:
    """A ControlNet of the model's with a random picture of a width and a height."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.rand(3, size[1], size[0], generator=generator) * 2 - 1
    return ControlUse(model.controls.load(name), picture, **how)


class Network(ModelMixin, ConfigMixin):
    """A network of one layer that diffusers saves and loads."""

    @register_to_config
    def __init__(self, width: int = 2, depth: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)


class Plain:
    """The kind of ControlNets of a model that takes those of width 2."""

    kind: Any = Network
    denoiser: nn.Module = nn.Linear(5, 2)
    knows_precedence = False
    once = False

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        return first_misfit(Network, config, {"width": 2})

    def config_of_file(self, tensors: Collection[str]) -> None:
        del tensors

    def prepared(self, network: Any) -> Any:
        return network

    def hint(self, network: Any, picture: Tensor) -> Tensor:
        return picture


def put_plain(folder: Path, name: str, **config: Any) -> None:
    Network(**config).save_pretrained(folder / name)

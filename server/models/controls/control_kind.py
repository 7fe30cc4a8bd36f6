"""Declares which ControlNets a family's denoiser accepts."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor, nn

__all__ = ["ControlKind", "first_misfit", "first_outside"]


class ControlKind(Protocol):
    """The ControlNets of a family; their residuals are added in the family's own forward pass."""

    @property
    def kind(self) -> Any:
        """Their class in diffusers."""
        ...

    @property
    def denoiser(self) -> nn.Module:
        """The network that they steer."""
        ...

    @property
    def knows_precedence(self) -> bool:
        """Whether a ControlNet and the prompt can be given different weight."""
        ...

    @property
    def once(self) -> bool:
        """Whether a ControlNet runs only on an image's row for the prompt, for all of its rows."""
        ...

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """The first way in which a ControlNet's config does not fit the model; None if it fits.

        Args:
            config: entries of a ``config.json``; missing ones have the defaults of the class.

        Returns:
            A clause for an error sentence.
        """
        ...

    def config_of_file(self, tensors: Collection[str]) -> Mapping[str, Any] | None:
        """The config of a ControlNet in a single file, which contains no config.

        Args:
            tensors: names of its tensors.

        Returns:
            The entries; None if the family's ControlNets are read only from folders, or if these
            tensors are not those of a ControlNet.
        """
        ...

    def prepared(self, network: Any) -> Any:
        """The network in the form in which it is kept, on the model's device.

        Args:
            network: instance of :attr:`kind`, in inference mode on the CPU.
        """
        ...

    def hint(self, network: Any, picture: Tensor) -> Tensor:
        """Preprocess an image for a network; the result is the same for all stages.

        Args:
            network: prepared network.
            picture: ``[3, H, W]`` float32 in [-1, 1].
        """
        ...


def first_misfit(kind: Any, config: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first entry of a config that differs from the required value, as a clause.

    Args:
        kind: class whose defaults apply to missing entries.
        config: entries of a ``config.json``.
        expected: required values by name.
    """
    declared = signature(kind.__init__).parameters
    for name, value in expected.items():
        found = _plain(config.get(name, declared[name].default))
        if found != _plain(value):
            return f"has {name} {str(found)[:60]}, where {_plain(value)} is needed"
    return None


def first_outside(config: Mapping[str, Any], allowed: Mapping[str, range]) -> str | None:
    """The first entry of a config that is not one of the allowed numbers, as a clause.

    Args:
        config: entries of a ``config.json``.
        allowed: allowed numbers by the name of the entry.
    """
    for name, numbers in allowed.items():
        found = config.get(name)
        if not isinstance(found, int) or found not in numbers:
            return f"has {name} {str(found)[:60]}, where {numbers[0]} to {numbers[-1]} are possible"
    return None


def _plain(value: Any) -> Any:
    """Convert a list, as JSON has it, to a tuple; other values are unchanged."""
    return tuple(value) if isinstance(value, list) else value

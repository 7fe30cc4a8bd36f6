"""What a family says of the ControlNets that its denoiser takes."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor, nn

__all__ = ["ControlKind", "first_misfit", "first_outside"]


class ControlKind(Protocol):
    """The ControlNets of a family; what they add is taken inside the family's own forward."""

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
        """Whether one of them and the prompt can count for different amounts."""
        ...

    @property
    def once(self) -> bool:
        """Whether one runs over the prompt's row of an image alone, for all of its rows."""
        ...

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """What in a ControlNet's config does not fit the model, as a clause; None where all does.

        Args:
            config: entries of a ``config.json``; those that are missing have the class's defaults.
        """
        ...

    def config_of_file(self, tensors: Collection[str]) -> Mapping[str, Any] | None:
        """The config of a ControlNet in a single file, which holds none.

        Args:
            tensors: names of its tensors.

        Returns:
            The entries; None where the family's are read from folders alone, or where these are no
            tensors of one.
        """
        ...

    def prepared(self, network: Any) -> Any:
        """The network as it is kept, on the model's device.

        Args:
            network: of the class, in inference mode on the CPU.
        """
        ...

    def hint(self, network: Any, picture: Tensor) -> Tensor:
        """What a network reads of a picture, the same at all stages.

        Args:
            network: that was prepared.
            picture: ``[3, H, W]`` float32 in [-1, 1].
        """
        ...


def first_misfit(kind: Any, config: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first entry of a config that has another value than it must have, as a clause.

    Args:
        kind: the class, whose defaults missing entries have.
        config: the entries.
        expected: what they must be.
    """
    declared = signature(kind.__init__).parameters
    for name, value in expected.items():
        found = _plain(config.get(name, declared[name].default))
        if found != _plain(value):
            return f"has {name} {str(found)[:60]}, where {_plain(value)} is needed"
    return None


def first_outside(config: Mapping[str, Any], allowed: Mapping[str, range]) -> str | None:
    """The first entry of a config that is none of the numbers it may be, as a clause.

    Args:
        config: entries of a ``config.json``.
        allowed: numbers by the names of entries.
    """
    for name, numbers in allowed.items():
        found = config.get(name)
        if not isinstance(found, int) or found not in numbers:
            return f"has {name} {str(found)[:60]}, where {numbers[0]} to {numbers[-1]} are possible"
    return None


def _plain(value: Any) -> Any:
    """A value in which lists, as JSON has them, are tuples."""
    return tuple(value) if isinstance(value, list) else value

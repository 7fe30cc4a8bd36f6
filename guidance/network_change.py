"""What changes the network for all predictions of an image."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel

if TYPE_CHECKING:
    from guidance.edits import Edit


class NetworkChange(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """The same change inside the network in every prediction of an image; costs no evaluation."""

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""

    @property
    @abstractmethod
    def edit(self) -> Edit:
        """What is changed inside the network."""

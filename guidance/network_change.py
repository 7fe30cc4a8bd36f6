"""The interface of changes to the network that apply to all predictions of an image."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel

if TYPE_CHECKING:
    from guidance.edits import Edit


class NetworkChange(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """A change inside the network in every prediction of an image; costs no evaluation."""

    summary: ClassVar[str]
    """One line for the user."""
    source: ClassVar[str]
    """Paper and equation."""

    @property
    @abstractmethod
    def edit(self) -> Edit:
        """The change made inside the network."""

"""The error for a sampler, spacing and schedule that are incompatible."""

from __future__ import annotations


class PlanError(ValueError):
    """No plan can be made from these settings; the message is a sentence for the user.

    Args:
        field: request field to change: ``steps``, ``strength``, ``sampler`` or ``spacing``, or a
            field of one of the last two, such as ``spacing.times``.
        message: one sentence that says what is allowed.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

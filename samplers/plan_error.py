"""The error of a sampler, spacing and schedule that do not fit together."""

from __future__ import annotations


class PlanError(ValueError):
    """No plan can be made of these settings; the message is a sentence for the user.

    Args:
        field: what to change, as a request names it: ``steps``, ``strength``, ``sampler`` or
            ``spacing``, or a field within one of the last two, such as ``spacing.times``.
        message: one sentence that says what is allowed.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

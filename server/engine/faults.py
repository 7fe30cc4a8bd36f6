"""Classification of errors: those of an image, of the memory, and of the device itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from server.errors import DeviceLost

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["attempt", "free_memory", "is_out_of_memory", "lost_device"]

Result = TypeVar("Result")

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed", "allocation_failed")
"""Phrases of drivers, libraries and the CPU's allocator, which lack torch's own exception."""

STICKY_ERRORS = (
    "illegal memory access",
    "device-side assert",
    "uncorrectable ecc",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
    "illegal address",
    "invalid program counter",
    "hardware stack error",
    "context is destroyed",
    "contained error",
    "nvlink",
)
"""After any of these, every later call of the process on its device fails."""

OF_THE_DEVICE = ("cuda error", "cudaerror", "cublas_status", "cudnn_status", "hip error")
"""Phrases of errors of a kernel or of the device itself; only another call can tell which."""


def attempt(work: Callable[[], Result], device: torch.device) -> Result | Exception:
    """Return the result of some work, or its error if the device can still be used.

    Raises:
        DeviceLost: it cannot.
    """
    try:
        return work()
    except DeviceLost:
        # Detected by an attempt inside this one.
        raise
    except Exception as error:
        lost = lost_device(error, device)
        if lost is not None:
            raise lost from error
        if is_out_of_memory(error):
            # The traceback's frames hold the tensors that there was no room for.
            return error.with_traceback(None)
        return error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory, so that less work, or the same later, may succeed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _says(error, OUT_OF_MEMORY)


def free_memory(device: torch.device) -> None:
    """Release memory that the allocator caches, so that other sizes fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def lost_device(error: BaseException, device: torch.device) -> DeviceLost | None:
    """The error for a device that no longer answers, if that is what this one means."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return None
    of_the_device = isinstance(error, torch.AcceleratorError) or _says(error, OF_THE_DEVICE)
    if _says(error, STICKY_ERRORS) or (of_the_device and not _answers(device)):
        return DeviceLost(_first_line(error))
    return None


def _answers(device: torch.device) -> bool:
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(phrase in text for phrase in phrases)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

"""The server on a device whose memory is too small for some of its forward passes.

    python -m benchmarks.promises.short_of_memory [--weak] --port PORT

After SIGUSR1, `FAULTS` forward passes of several rows run out of memory, each reported in the log;
those of the size `NEVER` always do.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.promises.weak import weaken
from server.cli import main as command_line
from server.models.unet_model import UNetModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["FAULTS", "NEVER", "REPORT"]

FAULTS: Final = 100
NEVER: Final = 256
"""Width in pixels for which there is never enough memory."""

REPORT: Final = "an injected fault"


@dataclass
class Faults:
    """The number of forward passes that will still run out of memory."""

    left: int = 0

    def begin(self, *_: object) -> None:
        """Start the faults; the signal's handler."""
        self.left = FAULTS

    def before(self, evaluate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap the forward pass so that it first runs out of memory where a fault is due."""

        def evaluated(model: UNetModel, x: Tensor, *given: Any) -> Tensor:
            if x.shape[-1] == model.latent_shape(NEVER, NEVER)[-1]:
                raise torch.OutOfMemoryError("out of memory: a size that never fits")
            if self.left and len(x) > 1:
                self.left -= 1
                print(REPORT, flush=True)
                raise torch.OutOfMemoryError(f"out of memory: {REPORT}")
            return evaluate(model, x, *given)

        return evaluated


def main() -> None:
    """Serve, short of memory."""
    if "--weak" in sys.argv:
        sys.argv.remove("--weak")
        weaken()
    faults = Faults()
    signal.signal(signal.SIGUSR1, faults.begin)
    UNetModel.evaluate = faults.before(UNetModel.evaluate)
    sys.argv[1:1] = ["serve"]
    command_line()


if __name__ == "__main__":
    main()

"""Training state on disk, replaced at once so that a stopped run leaves a whole file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from embedded.schedule import TrainingClock


@dataclass(slots=True)
class TrainingState:
    """What a resumed run needs: the modules by name, the optimiser, the clock."""

    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    clock: TrainingClock

    def store(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".writing")
        content = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.clock.step,
            "spent_s": self.clock.elapsed_s,
        }
        torch.save(content, fresh)
        fresh.replace(file)

    def restore(self, file: Path, device: str) -> None:
        content = torch.load(file, map_location=device)
        for name, module in self.modules.items():
            module.load_state_dict(content["modules"][name])
        self.optimizer.load_state_dict(content["optimizer"])
        self.clock.step, self.clock.spent_s = content["step"], content["spent_s"]


class RunningAverage:
    """Exponential moving average of a module's parameters, in a copy of the module."""

    def __init__(self, source: nn.Module, average: nn.Module, decay: float) -> None:
        self._source: list[Tensor] = list(source.parameters())
        self._average: list[Tensor] = list(average.parameters())
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after that step; early on the average forgets faster."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for average, parameter in zip(self._average, self._source, strict=True):
            average.lerp_(parameter, 1 - decay)

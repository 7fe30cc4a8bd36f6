"""Training state on disk, replaced atomically so that an interrupted run leaves a complete file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from embedded.schedule import TrainingClock
from samplers.whole_file import write_whole


@dataclass(slots=True)
class TrainingState:
    """The state that a resumed run needs: the modules by name, the optimizer and the clock."""

    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    clock: TrainingClock

    def store(self, file: Path) -> None:
        """Write the state to a safetensors file."""
        state = self.optimizer.state_dict()
        tensors = {
            f"optimizer.{parameter}.{key}": value
            for parameter, values in state["state"].items()
            for key, value in values.items()
        }
        for name, module in self.modules.items():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        metadata = {
            "groups": json.dumps([_without_rate(group) for group in state["param_groups"]]),
            "step": str(self.clock.step),
            "spent_s": str(self.clock.elapsed_s),
        }
        save(tensors, file, metadata)

    def restore(self, file: Path, device: str) -> None:
        """Read the state back, onto the device."""
        tensors = load_file(file, device)
        for name, module in self.modules.items():
            module.load_state_dict(_below(tensors, name))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _below(tensors, "optimizer").items():
            parameter, _, name = key.partition(".")
            state.setdefault(int(parameter), {})[name] = value
        metadata = metadata_of(file)
        stored: list[dict[str, Any]] = json.loads(metadata["groups"])
        rates = [group["lr"] for group in self.optimizer.param_groups]
        groups = [{**group, "lr": rate} for group, rate in zip(stored, rates, strict=True)]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.clock.step, self.clock.spent_s = int(metadata["step"]), float(metadata["spent_s"])


def save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file atomically."""
    whole = {key: value.contiguous() for key, value in tensors.items()}
    write_whole(file, to_bytes(whole, metadata))


def metadata_of(file: Path) -> dict[str, str]:
    """The metadata stored with the tensors."""
    with safe_open(file, "pt") as content:
        return dict(content.metadata() or {})


def _without_rate(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group without its learning rate, which the clock sets and which may be a tensor."""
    return {key: value for key, value in group.items() if key != "lr"}


def _below(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


class RunningAverage:
    """Exponential moving average of a module's parameters, in a copy of the module."""

    def __init__(self, source: nn.Module, average: nn.Module, decay: float) -> None:
        self._source: list[Tensor] = list(source.parameters())
        self._average: list[Tensor] = list(average.parameters())
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the parameters after a step; early in a run the average forgets faster."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for average, parameter in zip(self._average, self._source, strict=True):
            average.lerp_(parameter, 1 - decay)

"""The requests of a benchmark, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

SAMPLERS = ("ddim", "dpm_solver_pp", "unipc", "euler_ancestral")
GUIDANCE = ("none", "cfg", "apg")
STEPS = (4, 10, 20, 50)
SUBJECTS = ("red circle", "blue square", "green triangle", "yellow star", "purple ring")
PLACES = ("on a white background", "on a black background", "on a gray background")


@dataclass(frozen=True, slots=True)
class Request:
    """A request for one image.

    Attributes:
        arrival_s: seconds after the start of the run.
        prompt: caption.
        sampler: name of the sampler.
        guidance: name of the rule.
        steps: sampler steps.
        seed: of the image.
        size: width and height of the image in pixels; None for the model's own.
    """

    arrival_s: float
    prompt: str
    sampler: str
    guidance: str
    steps: int
    seed: int
    size: tuple[int, int] | None = None

    @property
    def evaluations(self) -> int:
        """Evaluations that the request takes if no policy saves any."""
        return self.steps * (1 if self.guidance == "none" else 2)

    @property
    def settings(self) -> tuple[str, str, int]:
        """What must be equal for a static batch."""
        return self.sampler, self.guidance, self.steps


def mixed(count: int, seed: int, most_steps: int, rate: float | None) -> list[Request]:
    """``count`` requests, uniform over samplers, kinds of guidance and step counts.

    Args:
        count: number of requests.
        seed: of the draw.
        most_steps: step counts above this are left out.
        rate: mean arrivals per second of a Poisson process; all at once if None.
    """
    random = Random(seed)
    steps = [n for n in STEPS if n <= most_steps] or [most_steps]
    clock = 0.0
    requests: list[Request] = []
    for i in range(count):
        prompt = f"a {random.choice(SUBJECTS)} {random.choice(PLACES)}"
        drawn = random.choice(SAMPLERS), random.choice(GUIDANCE), random.choice(steps)
        requests.append(Request(clock, prompt, *drawn, seed=i))
        clock += random.expovariate(rate) if rate else 0.0
    return requests


def homogeneous(count: int) -> list[Request]:
    """``count`` requests at once that agree in everything but seed and prompt.

    The best case of static batches, which then leave nothing to be woven.
    """
    return [
        Request(0.0, f"a {SUBJECTS[i % len(SUBJECTS)]} {PLACES[0]}", "dpm_solver_pp", "cfg", 20, i)
        for i in range(count)
    ]

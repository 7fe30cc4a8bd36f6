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
        seed: seed of the image.
        size: width and height of the image in pixels; None for the model's default.
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
        """Number of evaluations of the request if no policy saves any."""
        return self.steps * (1 if self.guidance == "none" else 2)

    @property
    def settings(self) -> tuple[str, str, int]:
        """The settings that must be equal in a static batch."""
        return self.sampler, self.guidance, self.steps


def mixed(count: int, seed: int, max_steps: int, rate: float | None) -> list[Request]:
    """``count`` requests, uniformly distributed over samplers, kinds of guidance and step counts.

    Args:
        count: number of requests.
        seed: seed of the random choices.
        max_steps: maximum step count; higher ones are left out.
        rate: mean arrivals per second of a Poisson process; None for all at once.
    """
    random = Random(seed)
    steps = [n for n in STEPS if n <= max_steps] or [max_steps]
    clock = 0.0
    requests: list[Request] = []
    for i in range(count):
        prompt = f"a {random.choice(SUBJECTS)} {random.choice(PLACES)}"
        drawn = random.choice(SAMPLERS), random.choice(GUIDANCE), random.choice(steps)
        requests.append(Request(clock, prompt, *drawn, seed=i))
        clock += random.expovariate(rate) if rate else 0.0
    return requests


def homogeneous(count: int) -> list[Request]:
    """``count`` simultaneous requests that differ only in seed and prompt.

    This is the best case for static batches, in which Weft has nothing to gain.
    """
    return [
        Request(0.0, f"a {SUBJECTS[i % len(SUBJECTS)]} {PLACES[0]}", "dpm_solver_pp", "cfg", 20, i)
        for i in range(count)
    ]

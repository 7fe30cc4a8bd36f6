"""What is measured: guidance, who sits for it, and in which order it matters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Sitting = Literal["captions", "again", "two", "overlapping", "avoiding", "pictures"]
"""Who is drawn; see :mod:`benchmarks.guidance_study.sitters`."""

STEPS = 20
FEW_STEPS = (2, 4, 8)
MORE_STEPS = 50
SCALES = (1.0, 2.0, 4.0, 7.5, 12.0, 20.0)
HIGH_SCALES = (4.0, 7.5, 12.0, 20.0)
PLUS_SCALES = (0.4, 0.6, 0.8, 1.0)
THRESHOLDS = (0.97, 0.991, 0.997, 0.999)
STRENGTH = 0.8

UNGUIDED: Mapping[str, Any] = {"name": "none"}


def cfg(scale: float) -> Mapping[str, Any]:
    """Classifier-free guidance, which at scale 1 is none."""
    return UNGUIDED if scale == 1 else {"name": "cfg", "scale": scale}


def apg(scale: float, **settings: Any) -> Mapping[str, Any]:
    """APG with its published settings but for those given."""
    return {"name": "apg", "scale": scale, **settings}


def plus(scale: float) -> Mapping[str, Any]:
    """CFG++."""
    return {"name": "cfg_plus_plus", "scale": scale}


def by(guidance: Mapping[str, Any], policy: str, **settings: Any) -> Mapping[str, Any]:
    """The same guidance under a policy."""
    return {**guidance, "policy": {"name": policy, **settings}}


def beside(guidance: Mapping[str, Any], *names: str, **settings: Any) -> Mapping[str, Any]:
    """The same guidance with perturbations, all of them with these settings."""
    return {**guidance, "perturbed": [{"name": name, **settings} for name in names]}


def tuned(guidance: Mapping[str, Any], bottom: float) -> Mapping[str, Any]:
    """The same guidance with skip-tuning."""
    return {**guidance, "skip_tuning": {"bottom": bottom}}


BASE = cfg(4.0)

OTHER_RULES: Mapping[str, Mapping[str, Any]] = {
    "cfg_rescale": {"name": "cfg_rescale"},
    "dynamic_thresholding": {"name": "dynamic_thresholding"},
    "tcfg": {"name": "tcfg"},
    "cfg_zero_star": {"name": "cfg_zero_star"},
    "magnitude_aware": {"name": "magnitude_aware"},
}
"""Those of one scale, to be measured at the scales of CFG."""

FREQUENCIES = tuple(
    {"name": "frequency_decoupled", "scale": low, "scale_high": high}
    for low, high in ((4.0, 8.0), (8.0, 4.0))
)

APG_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "projection alone": apg(7.5, momentum=0.0, norm_threshold=0.0),
    "no momentum": apg(7.5, momentum=0.0),
    "no bound": apg(7.5, norm_threshold=0.0),
    "parallel part kept": apg(7.5, eta=1.0),
    "bound alone": apg(7.5, momentum=0.0, eta=1.0),
}

ADAPTIVE = {threshold: by(BASE, "adaptive", threshold=threshold) for threshold in THRESHOLDS}
ADAPTIVE_NOISE = by(BASE, "adaptive", space="noise")
LINEAR: Mapping[str, Mapping[str, Any]] = {
    "linear_adaptive": by(BASE, "linear_adaptive"),
    "linear_adaptive, to the end": by(BASE, "linear_adaptive", stop=1.0),
}
STOPPED = {stop: by(BASE, "interval", low=0.0, high=1e6, stop=stop) for stop in (0.5, 0.75)}
"""Guidance that simply ends: what any policy that saves has to beat."""
INTERVALS: Mapping[str, Mapping[str, Any]] = {
    "interval (.28, 5.42]": by(BASE, "interval"),
    "interval (.28, ∞)": by(BASE, "interval", high=1e6),
    "first half": STOPPED[0.5],
    "first three quarters": STOPPED[0.75],
}
REUSED = {every: by(BASE, "reuse", every=every) for every in (2, 3)}
WIDE = {scale: by(cfg(scale), "interval") for scale in HIGH_SCALES}

PERTURBATIONS: Mapping[str, Mapping[str, Any]] = {
    "pag": {"name": "pag"},
    "seg": {"name": "seg"},
    "slg": {"name": "slg"},
    "slg, all steps": {"name": "slg", "start": 0.0, "stop": 1.0},
    "autoguidance": {"name": "autoguidance"},
}

COMBINED: Mapping[str, Mapping[str, Any]] = {
    "apg 4, reuse 2": by(apg(4.0), "reuse", every=2),
    "apg 4, adaptive": by(apg(4.0), "adaptive", threshold=0.991),
    "apg 4, interval": by(apg(4.0), "interval"),
    "cfg 2, reuse 2": by(cfg(2.0), "reuse", every=2),
    "cfg 4, autoguidance, adaptive": by(beside(BASE, "autoguidance"), "adaptive"),
    "cfg 7.5, interval": WIDE[7.5],
}

RESIDUAL_SCALES = (1.2, 1.5, 2.0, 4.0)

OVERLAPPING: Mapping[str, Mapping[str, Any]] = {
    "cfg 4": BASE,
    "perp_neg 4": {"name": "perp_neg", "scale": 4.0},
}
AVOIDING: Mapping[str, Mapping[str, Any]] = {
    "none": UNGUIDED,
    "cfg 4": BASE,
    "cfg 4, adaptive": by(BASE, "adaptive"),
    "cfg 4, linear_adaptive": by(BASE, "linear_adaptive"),
    "cfg 4, reuse 2": REUSED[2],
    "perp_neg 4": {"name": "perp_neg", "scale": 4.0},
}
COMPOSED: Mapping[str, Mapping[str, Any]] = {
    "cfg 4": BASE,
    "composed, each thing by 1": {
        "name": "composed",
        "scale": 4.0,
        "prompts": [{"prompt": "{first}", "weight": 1.0}, {"prompt": "{second}", "weight": 1.0}],
    },
    "composed, own 2, each thing by 2": {
        "name": "composed",
        "scale": 2.0,
        "prompts": [{"prompt": "{first}", "weight": 2.0}, {"prompt": "{second}", "weight": 2.0}],
    },
}

RATED: Mapping[str, Mapping[str, Any]] = {
    "always": BASE,
    "adaptive": ADAPTIVE[0.991],
    "linear_adaptive": LINEAR["linear_adaptive"],
    "interval": INTERVALS["interval (.28, 5.42]"],
    "reuse 2": REUSED[2],
    "residual, onetime": by(cfg(1.5), "residual", mode="onetime"),
    "none": UNGUIDED,
}
"""What is timed in the engine."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One guidance, and who is drawn with it.

    Attributes:
        guidance: as a request gives it; ``{first}`` and ``{second}`` stand for a sitter's things.
        sitting: who is drawn.
        steps: of the default sampler.
        block: which captions: the first so many, the next so many, ...
    """

    guidance: Mapping[str, Any]
    sitting: Sitting = "captions"
    steps: int = STEPS
    block: int = 0

    def of(self, weights: str, images: int) -> dict[str, Any]:
        """What its result is the result of, for the records.

        Args:
            weights: what tells the model from others.
            images: captions of a block.
        """
        return {
            "part": "pictures",
            "sitting": self.sitting,
            "guidance": dict(self.guidance),
            "steps": self.steps,
            "block": self.block,
            "captions": images,
            "weights": weights,
        }

    def full(self) -> Cell | None:
        """The cell whose pictures a policy that saves should give; None if this is one of them."""
        return self._without("policy") if "policy" in self.guidance else None

    def undisturbed(self) -> Cell | None:
        """The cell without what is changed inside the network; None if nothing is."""
        changed = "perturbed" in self.guidance or "skip_tuning" in self.guidance
        return self._without("perturbed", "skip_tuning") if changed else None

    def _without(self, *names: str) -> Cell:
        left = {key: value for key, value in self.guidance.items() if key not in names}
        return replace(self, guidance=left)


def all_cells() -> Iterator[Cell]:
    """Every cell once, the most important first."""
    seen: list[Cell] = []
    for cell in _in_order():
        if cell not in seen:
            seen.append(cell)
            yield cell


def _in_order() -> Iterator[Cell]:
    yield from _cells([cfg(scale) for scale in (4.0, 1.0, 7.5, 12.0, 20.0, 2.0)])
    yield from _cells([apg(scale) for scale in (7.5, 12.0, 20.0, 4.0)])
    yield from _cells([ADAPTIVE[0.991], LINEAR["linear_adaptive"], *REUSED.values()])
    yield from _cells([plus(scale) for scale in (0.6, 1.0)])
    yield from _cells([*INTERVALS.values()])
    yield from _few_step_cells()
    yield from _cells([*ADAPTIVE.values(), ADAPTIVE_NOISE, RATED["residual, onetime"]])
    for settings in PERTURBATIONS.values():
        yield Cell({**UNGUIDED, "perturbed": [settings]})
    yield from _cells([{**rule, "scale": 7.5} for rule in OTHER_RULES.values()])
    yield from _cells([*APG_VARIANTS.values(), *COMBINED.values()])
    yield from _cells([*map(cfg, (4.0, 1.0, 12.0)), apg(12.0), plus(0.6)], "again")
    yield from _cells([*AVOIDING.values()], "avoiding")
    yield from _cells([beside(BASE, "pag"), beside(BASE, "autoguidance")])
    yield from (Cell(tuned(BASE, bottom), steps=4) for bottom in (0.8, 0.6))
    for second in (UNGUIDED, BASE, cfg(2.0), apg(4.0)):
        yield Cell(second, block=1)
    yield from _cells([WIDE[12.0]])
    yield from _cells([LINEAR["linear_adaptive, to the end"], plus(0.8), plus(0.4)])
    yield from _cells([*OVERLAPPING.values()], "overlapping")
    yield from _cells([*COMPOSED.values()], "two")
    yield from _cells([tuned(BASE, 0.8), tuned(BASE, 0.6), tuned(UNGUIDED, 0.8)])
    yield from _cells([*FREQUENCIES])
    yield Cell(cfg(12.0), steps=MORE_STEPS)
    yield from _cells([beside(BASE, "seg"), beside(BASE, "slg")])
    yield from _cells([{**rule, "scale": 20.0} for rule in OTHER_RULES.values()])
    yield from _cells([WIDE[20.0]])
    more = [*map(cfg, (2.0, 7.5, 20.0)), *map(apg, (4.0, 7.5, 20.0)), WIDE[4.0], WIDE[12.0]]
    yield from _cells(more, "again")
    for second in (ADAPTIVE[0.991], REUSED[2], apg(7.5)):
        yield Cell(second, block=1)


def _cells(guidance: Sequence[Mapping[str, Any]], sitting: Sitting = "captions") -> Iterator[Cell]:
    return (Cell(one, sitting) for one in guidance)


def _few_step_cells() -> Iterator[Cell]:
    for steps in (4, 2, 8):
        yield Cell(BASE, steps=steps)
        yield Cell(UNGUIDED, steps=steps)
        for scale in RESIDUAL_SCALES:
            yield Cell(by(cfg(scale), "residual", mode="onetime"), steps=steps)
        yield Cell(cfg(2.0), steps=steps)
    for guidance in (UNGUIDED, BASE, *(by(cfg(s), "residual") for s in RESIDUAL_SCALES)):
        yield Cell(guidance, "pictures", steps=5)

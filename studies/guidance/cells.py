"""The cells of the study, in order of importance.

A cell is a guidance setting together with the captions that are drawn with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from studies.common.records import key_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Sitting = Literal["captions", "again", "two", "overlapping", "avoiding", "aimed", "pictures"]
"""Which set of captions is drawn; see :mod:`studies.guidance.sitters`."""

BLOCKS = 3
"""Number of blocks of captions for which every cell is drawn, if there is time."""
STEPS = 20
FEW_STEPS = (2, 4, 8)
MORE_STEPS = 50
SCALES = (1.0, 2.0, 4.0, 7.5, 12.0, 20.0)
HIGH_SCALES = (4.0, 7.5, 12.0, 20.0)
PLUS_SCALES = (0.4, 0.6, 0.8, 1.0)
THRESHOLDS = (0.97, 0.991, 0.997, 0.999)
STRENGTH = 0.8
BOTTOMS = (0.8, 0.6)
"""Values of skip-tuning's ``bottom``."""
GROUP = 4
"""Number of images in a request whose images depend on each other."""

DDIM: Mapping[str, Any] = {"name": "ddim"}
ANCESTRAL: Mapping[str, Any] = {"name": "ddim", "eta": 1.0}
UNGUIDED: Mapping[str, Any] = {"name": "none"}


def cfg(scale: float) -> Mapping[str, Any]:
    """Classifier-free guidance; no guidance at scale 1."""
    return UNGUIDED if scale == 1 else {"name": "cfg", "scale": scale}


def apg(scale: float, **settings: Any) -> Mapping[str, Any]:
    """APG with its published settings, except those given."""
    return {"name": "apg", "scale": scale, **settings}


def plus(scale: float) -> Mapping[str, Any]:
    """CFG++."""
    return {"name": "cfg_plus_plus", "scale": scale}


def magnitude_aware(scale: float) -> Mapping[str, Any]:
    """CFG that is reduced where the guidance is large."""
    return {"name": "magnitude_aware", "scale": scale}


def by(guidance: Mapping[str, Any], policy: str, **settings: Any) -> Mapping[str, Any]:
    """The same guidance with a policy."""
    return {**guidance, "policy": {"name": policy, **settings}}


def beside(guidance: Mapping[str, Any], *names: str, **settings: Any) -> Mapping[str, Any]:
    """The same guidance with perturbations, all of which have these settings."""
    return {**guidance, "perturbed": [{"name": name, **settings} for name in names]}


def aimed(guidance: Mapping[str, Any], name: str, **settings: Any) -> Mapping[str, Any]:
    """The same guidance with a term of the model's classifier."""
    return {**guidance, "classifier": {"name": name, **settings}}


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
"""Other rules with a single scale, measured at the scales of CFG."""

FREQUENCIES = tuple(
    {"name": "frequency_decoupled", "scale": low, "scale_high": high}
    for low, high in ((4.0, 8.0), (8.0, 4.0), (2.0, 4.0))
)

APG_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "projection alone": apg(7.5, momentum=0.0, norm_threshold=0.0),
    "no momentum": apg(7.5, momentum=0.0),
    "no bound": apg(7.5, norm_threshold=0.0),
    "parallel part kept": apg(7.5, eta=1.0),
    "bound alone": apg(7.5, momentum=0.0, eta=1.0),
}

NO_MOMENTUM = APG_VARIANTS["no momentum"]
SOLVED: Mapping[str, Mapping[str, Any]] = {
    "cfg 7.5": cfg(7.5),
    "cfg 12": cfg(12.0),
    "apg 7.5": apg(7.5),
    "apg 7.5, no momentum": NO_MOMENTUM,
}
SOLVED_BY: Mapping[str, tuple[Mapping[str, Any] | None, int]] = {
    "dpm_solver_pp, 20 steps": (None, STEPS),
    "ddim, 20 steps": (DDIM, STEPS),
    "dpm_solver_pp, 50 steps": (None, MORE_STEPS),
    "ddim, 50 steps": (DDIM, MORE_STEPS),
}
"""Samplers and steps with which high scales and APG's momentum are measured."""

PLUS_AT_50: Mapping[str, Mapping[str, Any]] = {
    "none": UNGUIDED,
    "cfg 2": cfg(2.0),
    "cfg 4": BASE,
    "cfg 4.8": cfg(4.8),
    "cfg 7.5": cfg(7.5),
    "cfg_plus_plus 0.6": plus(0.6),
    "cfg_plus_plus 1": plus(1.0),
}
"""With DDIM and 50 steps, as published; 0.6 corresponds there to a CFG scale of 4.8 (median)."""

ADAPTIVE = {threshold: by(BASE, "adaptive", threshold=threshold) for threshold in THRESHOLDS}
ADAPTIVE_NOISE = by(BASE, "adaptive", space="noise")
LINEAR: Mapping[str, Mapping[str, Any]] = {
    "linear_adaptive": by(BASE, "linear_adaptive"),
    "linear_adaptive, to the end": by(BASE, "linear_adaptive", stop=1.0),
}
STOPPED = {stop: by(BASE, "interval", low=0.0, high=1e6, stop=stop) for stop in (0.5, 0.75)}
"""Guidance that simply ends early: the baseline for any policy that saves evaluations."""
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

LAYERS = ("down_blocks.1", "down_blocks.2", "middle", "up_blocks.0", "up_blocks.1")
ELSEWHERE: Mapping[str, Mapping[str, Any]] = {
    **{f"pag, {layer}": {"name": "pag", "layers": [layer]} for layer in LAYERS},
    **{f"seg, {layer}": {"name": "seg", "layers": [layer]} for layer in LAYERS},
    **{
        f"slg, {layer}, all steps": {"name": "slg", "start": 0.0, "stop": 1.0, "layers": [layer]}
        for layer in LAYERS
    },
}
"""Perturbations of one level of the network at a time."""

COMBINED: Mapping[str, Mapping[str, Any]] = {
    "apg 4, reuse 2": by(apg(4.0), "reuse", every=2),
    "apg 4, adaptive": by(apg(4.0), "adaptive", threshold=0.991),
    "apg 4, interval": by(apg(4.0), "interval"),
    "apg 4, linear_adaptive": by(apg(4.0), "linear_adaptive"),
    "magnitude_aware 7.5, reuse 2": by(magnitude_aware(7.5), "reuse", every=2),
    "magnitude_aware 7.5, adaptive": by(magnitude_aware(7.5), "adaptive", threshold=0.991),
    "cfg_plus_plus 0.6, reuse 2": by(plus(0.6), "reuse", every=2),
    "cfg 2, reuse 2": by(cfg(2.0), "reuse", every=2),
    "cfg 4, autoguidance, adaptive": by(beside(BASE, "autoguidance"), "adaptive"),
    "cfg 7.5, interval": WIDE[7.5],
}

RESIDUAL_SCALES = (1.2, 1.5, 2.0, 4.0)

OVERLAPPING: Mapping[str, Mapping[str, Any]] = {
    "cfg 4": BASE,
    "perp_neg 4": {"name": "perp_neg", "scale": 4.0},
    "perp_neg 7.5": {"name": "perp_neg", "scale": 7.5},
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

AIMED_SCALES = (1.0, 2.0, 4.0, 8.0)
BACKGROUND: Mapping[str, Mapping[str, Any]] = {
    "cfg 4": BASE,
    **{
        f"cfg 4, elucd {scale:g}": aimed(
            BASE, "elucd", scale=scale, target={"background": "{background}"}
        )
        for scale in AIMED_SCALES
    },
}
"""Guidance towards a background that the prompt does not mention."""
CONFUSED: Mapping[str, Mapping[str, Any]] = {
    "none": UNGUIDED,
    "cfg 2": cfg(2.0),
    **{
        f"none, {name} {scale:g}": aimed(
            UNGUIDED, name, scale=scale, target={"shape": "{shape}", "colour": "{colour}"}
        )
        for name in ("gradient_free", "elucd")
        for scale in (1.0, 4.0)
    },
}
"""Guidance towards the shape and color that the prompt mentions."""

APART: Mapping[str, Mapping[str, Any]] = {
    "cfg 4": BASE,
    "cfg 4, negtome": {**BASE, "negtome": {}},
    "cfg 4, negtome to the end": {**BASE, "negtome": {"stop": 1.0}},
    "cfg 4, negtome 3 to the end": {**BASE, "negtome": {"stop": 1.0, "strength": 3.0}},
}
"""Images of a request that are pushed away from the first."""
PARTICLES: Mapping[str, Mapping[str, Any]] = {
    f"cfg {scale:g}{name}": {**cfg(scale), **more}
    for scale in (2.0, 4.0)
    for name, more in (("", {}), (", fkc", {"particles": {"name": "fkc"}}))
}
"""Images of a request as particles, with a sampler that adds the noise of the reverse diffusion."""

RATED: Mapping[str, Mapping[str, Any]] = {
    "always": BASE,
    "adaptive": ADAPTIVE[0.991],
    "linear_adaptive": LINEAR["linear_adaptive"],
    "interval": INTERVALS["interval (.28, 5.42]"],
    "reuse 2": REUSED[2],
    "residual, onetime": by(cfg(1.5), "residual", mode="onetime"),
    "none": UNGUIDED,
}
"""Settings that are timed in the engine."""


KIND = ("sitting", "guidance", "steps", "sampler", "each")
"""Entries that distinguish cells, apart from the captions of a sitting."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One guidance setting, and the captions that are drawn with it.

    Attributes:
        guidance: as in a request; ``{first}`` and ``{second}`` stand for the things of a caption.
        sitting: which set of captions is drawn.
        steps: number of steps of the sampler.
        block: index of the block of captions.
        sampler: the sampler; None for the default one.
        each: number of images per request.
    """

    guidance: Mapping[str, Any]
    sitting: Sitting = "captions"
    steps: int = STEPS
    block: int = 0
    sampler: Mapping[str, Any] | None = None
    each: int = 1

    def of(self, weights: str, images: int) -> dict[str, Any]:
        """Key of its result in the records.

        Args:
            weights: identifier of the model.
            images: number of captions in a block.
        """
        return {
            "part": "pictures",
            **self.kind,
            "block": self.block,
            "captions": images,
            "weights": weights,
        }

    @property
    def kind(self) -> dict[str, Any]:
        """The key without the captions of a sitting; default settings are left out."""
        return {
            "sitting": self.sitting,
            "guidance": dict(self.guidance),
            "steps": self.steps,
            **({"sampler": dict(self.sampler)} if self.sampler is not None else {}),
            **({"each": self.each} if self.each > 1 else {}),
        }

    def full(self) -> Cell | None:
        """The cell without its policy, whose pictures it should reproduce; None if it has none."""
        return self._without("policy") if "policy" in self.guidance else None

    def undisturbed(self) -> Cell | None:
        """The cell without changes inside the network; None if it has no such changes."""
        inside = ("perturbed", "skip_tuning", "negtome")
        return self._without(*inside) if any(name in self.guidance for name in inside) else None

    def _without(self, *names: str) -> Cell:
        left = {key: value for key, value in self.guidance.items() if key not in names}
        return replace(self, guidance=left)


def all_cells() -> Iterator[Cell]:
    """Every cell once: all of them for the first block of captions, then for the next, ..."""
    for block in range(BLOCKS):
        once = _of_one_block() if block == 0 else ()
        cells = {key_of(cell.kind): cell for cell in (*_in_order(), *once)}
        yield from (replace(cell, block=block) for cell in cells.values())


def _in_order() -> Iterator[Cell]:
    """The cells of one block, the most important first."""
    yield from _cells([cfg(scale) for scale in (4.0, 1.0, 7.5, 12.0, 20.0, 2.0)])
    yield from _cells([apg(scale) for scale in (7.5, 12.0, 20.0, 4.0)])
    yield from _cells([ADAPTIVE[0.991], LINEAR["linear_adaptive"], *REUSED.values()])
    yield from _cells([plus(scale) for scale in PLUS_SCALES])
    yield from _cells([*INTERVALS.values()])
    yield from _few_step_cells()
    yield from _cells([*ADAPTIVE.values(), ADAPTIVE_NOISE, RATED["residual, onetime"]])
    for settings in PERTURBATIONS.values():
        yield Cell({**UNGUIDED, "perturbed": [settings]})
    for scale in (7.5, 20.0, 4.0):
        yield from _cells([{**rule, "scale": scale} for rule in OTHER_RULES.values()])
    yield from _cells([magnitude_aware(scale) for scale in HIGH_SCALES])
    yield from _cells([*APG_VARIANTS.values(), *COMBINED.values()])
    for sampler, steps in SOLVED_BY.values():
        yield from (Cell(one, steps=steps, sampler=sampler) for one in SOLVED.values())
    for one in PLUS_AT_50.values():
        yield Cell(one, steps=MORE_STEPS, sampler=DDIM)
    yield from _cells([*AVOIDING.values()], "avoiding")
    yield from _cells([*OVERLAPPING.values()], "overlapping")
    yield from _cells([*COMPOSED.values()], "two")
    yield from _cells([*FREQUENCIES, LINEAR["linear_adaptive, to the end"]])
    yield from _cells([beside(BASE, name) for name in ("pag", "seg", "slg", "autoguidance")])
    yield from (Cell(tuned(BASE, bottom), steps=4) for bottom in BOTTOMS)
    yield from _cells([tuned(base, bottom) for base in (BASE, UNGUIDED) for bottom in BOTTOMS])
    yield from _cells([*BACKGROUND.values(), *CONFUSED.values()], "aimed")
    yield from (Cell(one, each=GROUP) for one in APART.values())
    yield from (Cell(one, sampler=ANCESTRAL, each=GROUP) for one in PARTICLES.values())
    yield from _cells([*WIDE.values()])
    often = [*map(cfg, SCALES), *map(apg, HIGH_SCALES), plus(0.6), *WIDE.values()]
    yield from _cells(often, "again")


def _of_one_block() -> Iterator[Cell]:
    for settings in ELSEWHERE.values():
        yield Cell({**UNGUIDED, "perturbed": [settings]})


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

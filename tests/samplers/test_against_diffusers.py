"""Complete runs compared with the same scheduler in diffusers' own pipeline, on the embedded model.

``make test`` replaces the model by a smaller U-Net with random weights, ``make test-all`` does not.
Both sides have the same start latents and the same prompts with classifier-free guidance, in
float32. Where diffusers draws noise from a generator, ours is drawn from one with the same seed.
What remains is rounding: diffusers' products of alphas and step coefficients are float32, ours are
float64.

Some conventions of diffusers differ in ways that a sampler cannot, and are reproduced here:

- In diffusers' space of sigma / alpha, runs spaced ``linspace`` or ``trailing`` start from
  sigma / alpha times the noise, which is sigma times the noise in ours; ``leading`` runs start from
  unit noise, as ours always do.
- Euler and related schedulers do not round ``linspace``. DDIM counts back a fixed stride to find
  the next level, which is the next timestep for ``leading``, and for ``trailing`` if the number of
  steps divides 1000.
- The multistep solvers truncate the timesteps of ``exponential`` and ``beta`` to whole ones but
  keep the levels. Only Euler gives the network the time it steps from, so Euler is compared.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import AysSchedules
from torch import Tensor

from embedded import MODEL_FOLDER
from samplers import (
    SAMPLERS,
    Grid,
    NoiseSchedule,
    Plan,
    Sampler,
    Spacing,
    integrate,
    preconditioning,
)
from samplers.align_your_steps import AlignYourSteps
from samplers.beta import Beta
from samplers.custom_times import Custom
from samplers.ddim import DDIM
from samplers.deis import DEIS
from samplers.dpm_2 import DPM2
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.dpm_solver_pp_singlestep import DPMSolverPPSinglestep
from samplers.dpm_solver_v3 import DPMSolverV3
from samplers.euler import Euler, EulerAncestral
from samplers.exponential import Exponential
from samplers.heun import Heun
from samplers.lcm import LCM
from samplers.lms import LMS
from samplers.plms import PLMS
from samplers.sa_solver import SASolver
from samplers.step_order import LowerOrder
from samplers.tcd import TCD
from samplers.timesteps import Karras, LCMSpacing, Leading, Linspace, LogSNR, Trailing
from samplers.unipc import UniPC
from tests.covering import EVERY_CELL, covering

PROMPT, NEGATIVE = "a red circle left of a blue square", "a green star"
SCALE = 4.0
SEED = 11
TOLERANCE = 2e-5
"""Relative tolerance on final latents. Both sides are float32, and rounding errors grow along a
run: to 1e-6 in most runs and at most 3e-6, with random and with trained weights."""
BETWEEN_LEVELS = 2e-4
"""Tolerance with logarithmic spacings, whose levels lie between trained steps and are float32 in
diffusers: up to 4e-5 with trained weights."""
BETWEEN_TIMES = 1e-3
"""Tolerance for times between trained steps, which diffusers interpolates in log sigma."""
CONFIG: dict[str, Any] = json.loads((MODEL_FOLDER / "scheduler/scheduler_config.json").read_text())
SIDE = 16 if EVERY_CELL else 8
"""Side of the latents; the embedded model's default is 16."""
SMALL: dict[str, Any] = {
    "sample_size": SIDE,
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


class Prompts(NamedTuple):
    """The network's conditioning, encoded once for all runs."""

    cond: Tensor
    uncond: Tensor


@pytest.fixture(scope="module")
def pipeline() -> Any:
    torch.set_grad_enabled(False)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(MODEL_FOLDER).to(torch.float32)
    if not EVERY_CELL:
        torch.manual_seed(SEED)
        width = pipeline.unet.config.cross_attention_dim
        pipeline.unet = UNet2DConditionModel(cross_attention_dim=width, **SMALL).eval()
    pipeline.set_progress_bar_config(disable=True)
    yield pipeline
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def prompts(pipeline: Any) -> Prompts:
    return Prompts(*pipeline.encode_prompt(PROMPT, "cpu", 1, True, negative_prompt=NEGATIVE))


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(SEED))


@dataclass(frozen=True)
class Pair:
    """A scheduler of diffusers, and the equivalent sampler and spacing of ours."""

    scheduler: type[Any]
    options: dict[str, Any]
    sampler: Sampler
    spacing: Spacing
    steps: int = 5
    starts_from_sigma: bool = False
    lands_clean: bool = True
    eta: float = 0.0
    tolerance: float = TOLERANCE
    timesteps: Sequence[float] | None = None


def theirs(pipeline: Any, prompts: Prompts, pair: Pair, latents: Tensor) -> Tensor:
    pipeline.scheduler = pair.scheduler.from_config(CONFIG | pair.options)
    return pipeline(
        prompt_embeds=prompts.cond,
        negative_prompt_embeds=prompts.uncond,
        num_inference_steps=pair.steps,
        timesteps=pair.timesteps,
        guidance_scale=SCALE,
        eta=pair.eta,
        latents=latents,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images


def guided(pipeline: Any, prompts: Prompts, plan: Plan) -> Callable[[Tensor, float], Tensor]:
    """The embedded model with guidance, as a denoiser along a plan."""
    both = torch.cat([prompts.uncond, prompts.cond])
    prediction = CONFIG["prediction_type"]
    levels = iter(zip(plan.alpha, plan.sigma, strict=True))

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = next(levels)
        _, skip, out = preconditioning(prediction, alpha, sigma)
        raw = pipeline.unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample
        other, cond = (float(skip) * x + float(out) * raw).chunk(2)
        return other + SCALE * (cond - other)

    return denoise


def ours(pipeline: Any, prompts: Prompts, pair: Pair, latents: Tensor) -> Tensor:
    schedule = NoiseSchedule.from_diffusers(CONFIG | pair.options)
    grid = schedule.grid(pair.spacing, pair.steps)
    if not pair.lands_clean:
        grid = Grid.on_times(schedule, np.append(grid.t[:-1], 0.0), clean=False)
    plan = pair.sampler.plan(grid)
    generator = torch.Generator().manual_seed(SEED)
    start = latents * (plan.sigma[0] if pair.starts_from_sigma else plan.start_scale)
    return integrate(
        plan,
        guided(pipeline, prompts, plan),
        start,
        lambda _: torch.randn(latents.shape, generator=generator),
    )


def distance(pipeline: Any, prompts: Prompts, pair: Pair, latents: Tensor) -> float:
    """Relative distance of the final latents."""
    reference = theirs(pipeline, prompts, pair, latents)
    return float((ours(pipeline, prompts, pair, latents) - reference).norm() / reference.norm())


class MendedSDE(DPMSolverMultistepScheduler):
    """diffusers' solver with the correct sign in the stochastic third-order update.

    diffusers' weight of the second difference is ``(1 - e^(-2h) - 2h) / (2h)^2 - 1/2``, which tends
    to -1 as steps shrink. With ``+ 1/2``, as in k-diffusion's ``sample_dpmpp_3m_sde``, it tends to
    0.
    """

    def multistep_dpm_solver_third_order_update(
        self, model_output_list: list[Tensor], *args: Any, **options: Any
    ) -> Tensor:
        x = super().multistep_dpm_solver_third_order_update(model_output_list, *args, **options)
        i: Any = self.step_index
        alpha, _ = self._sigma_to_alpha_sigma_t(self.sigmas[i + 1])
        lam = [-self.sigmas[i + k].log() for k in (1, 0, -1, -2)]
        h = lam[0] - lam[1]
        r0, r1 = (lam[1] - lam[2]) / h, (lam[2] - lam[3]) / h
        D0, D1, D2 = model_output_list[-1], model_output_list[-2], model_output_list[-3]
        return x + alpha * ((D0 - D1) / r0 - (D1 - D2) / r1) / (r0 + r1)


class EvenSinglestep(DPMSolverSinglestepScheduler):
    """diffusers' singlestep solver with levels even in log SNR, where its inner points equal ours.

    It counts evaluations as steps and uses the next levels as the inner points of a step. If levels
    are even in log SNR, these are the authors' points. It also truncates times between trained
    steps to whole ones, which is undone here.
    """

    def set_timesteps(self, num_inference_steps: Any = None, *args: Any, **options: Any) -> None:
        config: Any = self.config
        evaluations = config.solver_order * (num_inference_steps - 1) + 1
        super().set_timesteps(evaluations, *args, **options)
        log_sigmas = np.log((1 / self.alphas_cumprod.double().numpy() - 1) ** 0.5)
        sigmas = self.sigmas[:-1].double().numpy()
        self.timesteps = torch.from_numpy(self._sigma_to_t(sigmas, log_sigmas))


class PLMSOfNoise(PNDMScheduler):
    """diffusers' PLMS on eps, as published, whatever the network predicts.

    diffusers extrapolates the network's raw outputs and then converts their mean, so on this model
    it fits the history of v.
    """

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, **options: Any) -> Any:  # type: ignore[override]
        alpha_squared: Any = self.alphas_cumprod[timestep]
        eps = alpha_squared**0.5 * model_output + (1 - alpha_squared) ** 0.5 * sample
        return super().step(eps, timestep, sample, **options)


class PreciseSASolver(SASolverScheduler):
    """diffusers' solver with float64 levels.

    In float32, the level of the first trained step, where it lands, is off by 4e-5 in log SNR,
    which the higher-order weights of its last step propagate into the picture.
    """

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        t = np.append(self.timesteps.numpy(), 0.0)
        alpha, sigma = NoiseSchedule.from_diffusers(CONFIG).level(t)
        self.sigmas = torch.from_numpy(sigma / alpha)


LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
TRAINED_END = {"set_alpha_to_one": False}
PLMS_ALONE = {"skip_prk_steps": True, "prediction_type": "epsilon"}
# The multistep solvers' linspace stops one stride above the clean end.
LINSPACE = {"timestep_spacing": "linspace"}
TO_THE_LAST_STRIDE = Linspace(endpoint=False)
OF_SHORT_RUNS: LowerOrder = "below_15_steps"
"""How diffusers lowers the order, except in UniPC, where it is always lowered."""


def dpm_solver(order: int, solver_type: str, variant: str) -> Pair:
    options = {
        "solver_order": order,
        "solver_type": "heun" if solver_type == "taylor" else solver_type,
        "algorithm_type": "dpmsolver++" if variant == "ode" else "sde-dpmsolver++",
    }
    sampler = {"order": order, "solver_type": solver_type, "variant": variant}
    return Pair(
        MendedSDE if variant == "sde" else DPMSolverMultistepScheduler,
        TRAILING | options,
        DPMSolverPP.model_validate(sampler | {"lower_order_final": OF_SHORT_RUNS}),
        Trailing(),
    )


def singlestep(order: int, solver_type: str) -> Pair:
    options = {
        "solver_order": order,
        "solver_type": "heun" if solver_type == "taylor" else solver_type,
        "use_exponential_sigmas": True,
    }
    sampler = {"order": order, "solver_type": solver_type}
    return Pair(
        EvenSinglestep,
        options,
        DPMSolverPPSinglestep.model_validate(sampler),
        LogSNR(),
        4,
        tolerance=BETWEEN_TIMES,
    )


def sa_solver(predictor: int, corrector: int, tau: float) -> Pair:
    orders = {"predictor_order": predictor, "corrector_order": corrector}
    return Pair(
        PreciseSASolver,
        TRAILING | orders | {"lower_order_final": False, "tau_func": lambda _: tau},
        SASolver.model_validate(orders | {"tau": tau, "second_order": "rounded"}),
        Trailing(),
        lands_clean=False,
    )


def unipc(order: int, variant: str) -> Pair:
    # At sigma 0 their bh1 multiplies an infinite B(h) by zero, so it is compared above that.
    lands_clean = variant == "bh2"
    end = "zero" if lands_clean else "sigma_min"
    return Pair(
        UniPCMultistepScheduler,
        TRAILING | {"solver_order": order, "solver_type": variant, "final_sigmas_type": end},
        UniPC.model_validate({"order": order, "variant": variant, "lower_order_final": "always"}),
        Trailing(),
        lands_clean=lands_clean,
    )


PAIRS = {
    "ddim-leading": Pair(DDIMScheduler, LEADING, DDIM(), Leading()),
    "ddim-trailing": Pair(DDIMScheduler, TRAILING, DDIM(), Trailing()),
    "ddim-landing-on-a-trained-step": Pair(
        DDIMScheduler, LEADING | TRAINED_END, DDIM(), Leading(), 25
    ),
    "ddim-evaluated-where-it-lands": Pair(
        DDIMScheduler, LEADING | TRAINED_END | {"steps_offset": 0}, DDIM(), Leading(offset=0)
    ),
    "ddim-eta-1-landing-on-a-trained-step": Pair(
        DDIMScheduler, TRAILING | TRAINED_END, DDIM(eta=1), Trailing(), eta=1.0
    ),
    # Only DDIM and PLMS land there; with the same folder Euler lands on the clean picture.
    "euler-of-a-folder-for-ddim": Pair(
        EulerDiscreteScheduler, LEADING | TRAINED_END, Euler(), Leading()
    ),
    "dpm_solver_pp-leading": Pair(
        DPMSolverMultistepScheduler,
        LEADING,
        DPMSolverPP(lower_order_final=OF_SHORT_RUNS),
        Leading(endpoint=False),
        10,
    ),
    "unipc-leading": Pair(
        UniPCMultistepScheduler,
        LEADING,
        UniPC(order=2, lower_order_final="always"),
        Leading(endpoint=False),
        10,
    ),
    "deis-leading": Pair(
        DEISMultistepScheduler,
        LEADING | {"solver_order": 2},
        DEIS(order=2, lower_order_final=OF_SHORT_RUNS),
        Leading(endpoint=False),
        lands_clean=False,
    ),
    "ddim-eta-0.4": Pair(DDIMScheduler, LEADING, DDIM(eta=0.4), Leading(), eta=0.4),
    "ddim-eta-1": Pair(DDIMScheduler, TRAILING, DDIM(eta=1), Trailing(), eta=1.0),
    "euler-leading": Pair(EulerDiscreteScheduler, LEADING, Euler(), Leading()),
    "euler-trailing": Pair(
        EulerDiscreteScheduler, TRAILING, Euler(), Trailing(), 7, starts_from_sigma=True
    ),
    # 999 / (10 - 1) is an integer, so that rounding makes no difference.
    "euler-linspace": Pair(
        EulerDiscreteScheduler, LINSPACE, Euler(), Linspace(), 10, starts_from_sigma=True
    ),
    # Karras levels span the last to the first trained step only if the base spacing is linspace.
    "euler-karras": Pair(
        EulerDiscreteScheduler,
        LINSPACE | {"use_karras_sigmas": True},
        Euler(),
        Karras(),
        starts_from_sigma=True,
        tolerance=BETWEEN_TIMES,
    ),
    "euler_ancestral-leading": Pair(
        EulerAncestralDiscreteScheduler, LEADING, EulerAncestral(), Leading()
    ),
    "euler_ancestral-trailing": Pair(
        EulerAncestralDiscreteScheduler,
        TRAILING,
        EulerAncestral(),
        Trailing(),
        starts_from_sigma=True,
    ),
    "euler-exponential": Pair(
        EulerDiscreteScheduler,
        LINSPACE | {"use_exponential_sigmas": True},
        Euler(),
        Exponential(),
        starts_from_sigma=True,
        tolerance=BETWEEN_TIMES,
    ),
    "euler-beta": Pair(
        EulerDiscreteScheduler,
        LINSPACE | {"use_beta_sigmas": True},
        Euler(),
        Beta(over="sigma"),
        starts_from_sigma=True,
        tolerance=BETWEEN_TIMES,
    ),
    # Without statistics, as diffusers has no sampler with statistics.
    "dpm_solver_v3-reduced": Pair(
        DPMSolverMultistepScheduler,
        TRAILING | {"solver_order": 2, "solver_type": "heun"},
        DPMSolverV3(
            order=2,
            predictor="exact",
            corrector="none",
            lower_order_final=True,
            statistics="none",
        ),
        Trailing(),
    ),
    # Diffusers' ends at the first trained step, not at the clean picture.
    **{
        f"deis-{order}-{steps}": Pair(
            DEISMultistepScheduler,
            TRAILING | {"solver_order": order},
            DEIS.model_validate({"order": order, "lower_order_final": OF_SHORT_RUNS}),
            Trailing(),
            steps,
            lands_clean=False,
        )
        for order, steps in ((1, 5), (2, 5), (3, 5), (2, 16), (3, 16))
    },
    # Counting back a fixed stride, theirs finds the next timestep for leading, and for trailing if
    # the steps divide 1000.
    **{
        f"plms-{spacing.name}-{steps}": Pair(
            PLMSOfNoise, options | PLMS_ALONE, PLMS(), spacing, steps
        )
        for options, spacing, steps in (
            (LEADING, Leading(), 1),
            (LEADING, Leading(), 2),
            (LEADING, Leading(), 7),
            (TRAILING, Trailing(), 8),
        )
    },
    "plms-landing-on-a-trained-step": Pair(
        PLMSOfNoise, LEADING | TRAINED_END | PLMS_ALONE, PLMS(), Leading(), 7
    ),
    "lms": Pair(LMSDiscreteScheduler, LEADING, LMS(), Leading()),
    "heun-leading": Pair(HeunDiscreteScheduler, LEADING, Heun(), Leading(), 5),
    **{
        f"dpm_2-eta-{eta}": Pair(kind, LEADING, DPM2(eta=eta), Leading(), tolerance=BETWEEN_TIMES)
        for kind, eta in ((KDPM2DiscreteScheduler, 0.0), (KDPM2AncestralDiscreteScheduler, 1.0))
    },
    "heun-trailing": Pair(
        HeunDiscreteScheduler, TRAILING, Heun(), Trailing(), 5, starts_from_sigma=True
    ),
    "heun-karras": Pair(
        HeunDiscreteScheduler,
        LINSPACE | {"use_karras_sigmas": True},
        Heun(),
        Karras(),
        5,
        starts_from_sigma=True,
        tolerance=BETWEEN_TIMES,
    ),
    "lcm": Pair(LCMScheduler, {}, LCM(), LCMSpacing(), 4),
    # Diffusers' ends at the first trained step, whatever the config says.
    **{
        f"tcd-{gamma}": Pair(
            TCDScheduler, TRAINED_END, TCD(gamma=gamma), LCMSpacing(), 4, eta=gamma
        )
        for gamma in (0.0, 0.3, 1.0)
    },
    # For order 3 with midpoint, diffusers uses another weight at the second inner point.
    **{
        f"dpm_solver_pp_singlestep-{order}-{solver_type}": singlestep(order, solver_type)
        for order, solver_type in ((2, "midpoint"), (2, "taylor"), (3, "taylor"))
    },
    **{
        f"sa_solver-{predictor}-{corrector}-{tau}": sa_solver(predictor, corrector, tau)
        for (predictor, corrector), tau in covering(
            product(((1, 2), (2, 2), (3, 3), (2, 3)), (0.0, 0.6, 1.0)), tuple
        )
    },
    **{
        f"dpm_solver_pp-{variant}-{order}-{solver_type}": dpm_solver(order, solver_type, variant)
        for variant in ("ode", "sde")
        for order in (1, 2, 3)
        for solver_type in ("midpoint", "taylor")
    },
    "dpm_solver_pp-linspace": Pair(
        DPMSolverMultistepScheduler,
        LINSPACE,
        DPMSolverPP(lower_order_final=OF_SHORT_RUNS),
        TO_THE_LAST_STRIDE,
    ),
    "dpm_solver_pp-karras": Pair(
        DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True},
        DPMSolverPP(lower_order_final=OF_SHORT_RUNS),
        Karras(whole=True),
        tolerance=BETWEEN_LEVELS,
    ),
    "dpm_solver_pp-logsnr": Pair(
        DPMSolverMultistepScheduler,
        {"use_lu_lambdas": True},
        DPMSolverPP(lower_order_final=OF_SHORT_RUNS),
        LogSNR(whole=True),
        tolerance=BETWEEN_LEVELS,
    ),
    "dpm_solver_pp-align_your_steps": Pair(
        DPMSolverMultistepScheduler,
        {},
        DPMSolverPP(lower_order_final=OF_SHORT_RUNS),
        AlignYourSteps(),
        10,
        timesteps=AysSchedules["StableDiffusionTimesteps"],
    ),
    "euler-custom": Pair(
        EulerDiscreteScheduler,
        LEADING,
        Euler(),
        Custom(times=(900.0, 600.0, 250.0, 40.0)),
        4,
        timesteps=[900, 600, 250, 40],
    ),
    "dpm_solver_pp-3-long": Pair(
        DPMSolverMultistepScheduler,
        TRAILING | {"solver_order": 3},
        DPMSolverPP(order=3, lower_order_final=OF_SHORT_RUNS),
        Trailing(),
        16,
    ),
    **{
        f"unipc-{order}-{variant}": unipc(order, variant)
        for order in (1, 2, 3)
        for variant in ("bh1", "bh2")
    },
    "unipc-linspace": Pair(
        UniPCMultistepScheduler, LINSPACE, UniPC(lower_order_final="always"), TO_THE_LAST_STRIDE
    ),
    "unipc-karras": Pair(
        UniPCMultistepScheduler,
        {"use_karras_sigmas": True, "solver_order": 3},
        UniPC(order=3, lower_order_final="always"),
        Karras(whole=True),
        tolerance=BETWEEN_LEVELS,
    ),
}


# diffusers' DEIS takes numpy's logarithm of tensors.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_final_latents_are_those_of_diffusers(
    pipeline: Any, prompts: Prompts, pair: Pair, latents: Tensor
) -> None:
    assert distance(pipeline, prompts, pair, latents) < pair.tolerance


NOT_THEIRS = {
    "dpm_fast",
    "dpm_solver_pp_sde",
    "er_sde",
    "ghvb",
    "gradient_estimation",
    "hb",
    "heunpp2",
    "nesterov",
    "restart",
    "sa_solver_pece",
    "score_sde_pc",
    "seeds",
}
"""Samplers for which diffusers has no scheduler, none for latent models, or one that needs
torchsde; their own tests compare them with their sources."""


def test_each_sampler_of_ours_is_compared() -> None:
    ours = {kind for kind in SAMPLERS if kind.__module__.startswith("samplers.")}
    compared = {type(pair.sampler) for pair in PAIRS.values()}
    assert {kind.model_fields["name"].default for kind in ours - compared} == NOT_THEIRS
    assert compared <= ours

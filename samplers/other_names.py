"""Tables of the names that other programs use for the samplers and spacings of this library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, TypeAlias

Fields: TypeAlias = Mapping[str, Any]
"""An object as in a request: a name, and the fields that differ from the defaults."""


@dataclass(frozen=True, slots=True)
class Label:
    """A sampler of AUTOMATIC1111 or Forge.

    Attributes:
        fields: our sampler.
        automatic: schedule type that "Automatic" means with it.
        aliases: its other names in that program.
        settings: fields of ours that are program settings there, not part of the name.
    """

    fields: Fields
    automatic: str
    aliases: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scheduler:
    """A scheduler of diffusers.

    Attributes:
        fields: our sampler for diffusers' defaults.
        spacing: our spacing for diffusers' defaults.
        options: for each option of diffusers, its values and the fields of our sampler that each
            value sets; values not listed have no equivalent.
        multistep: whether it follows the conventions of the multistep solvers: ``linspace`` without
            its endpoint, and whole timesteps with Karras levels.
    """

    fields: Fields
    spacing: Fields
    options: Mapping[str, Mapping[Any, Fields]] = field(default_factory=dict)
    multistep: bool = False


_LOWER: Final = "lower_order_final"
_NEVER_LOWERED: Final = {_LOWER: False}

AUTOMATIC1111: Final[Mapping[str, Label]] = MappingProxyType(
    {
        # k-diffusion never lowers the order; its 3M has the taylor form in its second step.
        "DPM++ 2M": Label(
            {"name": "dpm_solver_pp"} | _NEVER_LOWERED, "Karras", ("k_dpmpp_2m",), (_LOWER,)
        ),
        "DPM++ 2M SDE": Label(
            {"name": "dpm_solver_pp", "variant": "sde"} | _NEVER_LOWERED,
            "Exponential",
            ("k_dpmpp_2m_sde",),
            (_LOWER,),
        ),
        "DPM++ 2M SDE Heun": Label(
            {"name": "dpm_solver_pp", "variant": "sde", "solver_type": "taylor"} | _NEVER_LOWERED,
            "Exponential",
            ("k_dpmpp_2m_sde_heun",),
            (_LOWER,),
        ),
        "DPM++ 3M SDE": Label(
            {"name": "dpm_solver_pp", "variant": "sde", "order": 3, "solver_type": "taylor"}
            | _NEVER_LOWERED,
            "Exponential",
            ("k_dpmpp_3m_sde",),
            (_LOWER,),
        ),
        "DPM++ SDE": Label({"name": "dpm_solver_pp_sde"}, "Karras", ("k_dpmpp_sde",)),
        "DPM++ 2S a": Label(
            {"name": "dpm_solver_pp_singlestep", "order": 2, "eta": 1.0},
            "Karras",
            ("k_dpmpp_2s_a",),
        ),
        "Euler a": Label(
            {"name": "euler_ancestral"}, "Uniform", ("k_euler_a", "k_euler_ancestral")
        ),
        "Euler": Label({"name": "euler"}, "Uniform", ("k_euler",)),
        "Heun": Label({"name": "heun"}, "Uniform", ("k_heun",)),
        "DPM2": Label({"name": "dpm_2"}, "Karras", ("k_dpm_2",)),
        "DPM2 a": Label({"name": "dpm_2", "eta": 1.0}, "Karras", ("k_dpm_2_a",)),
        # AUTOMATIC1111 passes it the eta of ancestral samplers.
        "DPM fast": Label({"name": "dpm_fast", "eta": 1.0}, "Exponential", ("k_dpm_fast",)),
        "Restart": Label({"name": "restart"}, "Karras", ("restart",)),
        "DDIM": Label({"name": "ddim"}, "DDIM", ("ddim",)),
        "LMS": Label({"name": "lms"}, "Uniform", ("k_lms",)),
        "PLMS": Label({"name": "plms"}, "DDIM", ("plms",)),
        # Order 3, bh1 and a lowered final order are AUTOMATIC1111's default settings.
        "UniPC": Label(
            {"name": "unipc", "order": 3, "variant": "bh1", "lower_order_final": "always"},
            "DDIM",
            ("unipc",),
            ("order", "variant", _LOWER),
        ),
        "LCM": Label({"name": "lcm"}, "LCM", ("k_lcm",)),
    }
)
"""Samplers of AUTOMATIC1111's web UI 1.10 by their label."""

SCHEDULE_TYPES: Final[Mapping[str, Fields]] = MappingProxyType(
    {
        "Uniform": {"name": "linspace"},
        "Karras": {"name": "karras"},
        "Exponential": {"name": "exponential"},
        # At its default rho, 1.
        "Polyexponential": {"name": "exponential"},
        "SGM Uniform": {"name": "sgm_uniform"},
        "Align Your Steps": {"name": "align_your_steps"},
        "KL Optimal": {"name": "kl_optimal", "endpoint": False},
        "Simple": {"name": "trailing", "rounding": "up"},
        "Normal": {"name": "sgm_uniform", "endpoint": True},
        "DDIM": {"name": "leading"},
        "Beta": {"name": "beta", "over": "sigma"},
        "LCM": {"name": "lcm"},
    }
)
"""Schedule types of AUTOMATIC1111 by their label; LCM is the one that its LCM sampler uses."""

FORGE: Final[Mapping[str, Label]] = MappingProxyType(
    {
        "DDPM": Label({"name": "ddim", "eta": 1.0}, "Uniform", ("ddpm",)),
        "HeunPP2": Label({"name": "heunpp2"}, "Uniform", ("heunpp2",)),
        "IPNDM": Label({"name": "hb", "order": 4.0, "beta": 1.0}, "Uniform", ("ipndm",)),
        # Forge's weights of orders 3 and 4 deviate from the formula, which lms follows.
        "IPNDM_V": Label({"name": "lms"}, "Uniform", ("ipndm_v",)),
    }
)
"""Samplers that Forge has in addition to those of AUTOMATIC1111."""

FORGE_SCHEDULE_TYPES: Final[Mapping[str, Fields]] = MappingProxyType(
    {
        "Turbo": {"name": "trailing"},
        # Forge's table of eleven levels is the authors' table for ten steps.
        "Align Your Steps 11": {"name": "align_your_steps"},
        "Align Your Steps 32": {"name": "align_your_steps", "table": "sd15_32"},
        "Align Your Steps GITS": {"name": "align_your_steps", "table": "gits_sd15"},
    }
)
"""Schedule types that Forge has in addition to those of AUTOMATIC1111."""

COMFYUI_SAMPLERS: Final[Mapping[str, Fields]] = MappingProxyType(
    {
        "euler": {"name": "euler"},
        "euler_ancestral": {"name": "euler_ancestral"},
        "heun": {"name": "heun"},
        "dpm_2": {"name": "dpm_2"},
        "dpm_2_ancestral": {"name": "dpm_2", "eta": 1.0},
        "dpm_fast": {"name": "dpm_fast"},
        "dpmpp_2s_ancestral": {"name": "dpm_solver_pp_singlestep", "order": 2, "eta": 1.0},
        "dpmpp_sde": {"name": "dpm_solver_pp_sde"},
        "dpmpp_2m": {"name": "dpm_solver_pp"} | _NEVER_LOWERED,
        "dpmpp_2m_sde": {"name": "dpm_solver_pp", "variant": "sde"} | _NEVER_LOWERED,
        "dpmpp_2m_sde_heun": {"name": "dpm_solver_pp", "variant": "sde", "solver_type": "taylor"}
        | _NEVER_LOWERED,
        "dpmpp_3m_sde": {
            "name": "dpm_solver_pp",
            "variant": "sde",
            "order": 3,
            "solver_type": "taylor",
        }
        | _NEVER_LOWERED,
        "ddpm": {"name": "ddim", "eta": 1.0},
        "lcm": {"name": "lcm"},
        "lms": {"name": "lms"},
        "heunpp2": {"name": "heunpp2"},
        "ipndm": {"name": "hb", "order": 4.0, "beta": 1.0},
        "ipndm_v": {"name": "lms"},
        "res_multistep": {"name": "dpm_solver_pp", "solver_type": "taylor"} | _NEVER_LOWERED,
        "res_multistep_ancestral": {
            "name": "dpm_solver_pp",
            "variant": "sde",
            "solver_type": "taylor",
        }
        | _NEVER_LOWERED,
        "res_2s": {"name": "dpm_solver_pp_singlestep", "order": 2, "solver_type": "taylor"},
        "gradient_estimation": {"name": "gradient_estimation"},
        "er_sde": {"name": "er_sde"},
        "sa_solver_pece": {"name": "sa_solver_pece"},
        "seeds_2": {"name": "seeds"},
        "seeds_3": {"name": "seeds", "method": "three"},
        "exp_heun_2_x0": {"name": "seeds", "method": "heun", "eta": 0.0},
        "exp_heun_2_x0_sde": {"name": "seeds", "method": "heun"},
        # Its code runs Euler's method there; in requests the name is our own sampler's.
        "ddim": {"name": "euler"},
        "uni_pc": {"name": "unipc", "order": 3, "variant": "bh1", "lower_order_final": "always"},
        "uni_pc_bh2": {
            "name": "unipc",
            "order": 3,
            "variant": "bh2",
            "lower_order_final": "always",
        },
    }
)
"""Samplers of ComfyUI, with or without `_gpu` after them; res_2s is RES4LYF's."""

COMFYUI: Final[Mapping[str, Fields]] = MappingProxyType(
    {
        "normal": {"name": "sgm_uniform", "endpoint": True},
        "karras": {"name": "karras"},
        "exponential": {"name": "exponential"},
        "polyexponential": {"name": "exponential"},
        "sgm_uniform": {"name": "sgm_uniform"},
        "simple": {"name": "trailing", "rounding": "up"},
        "ddim_uniform": {"name": "leading"},
        "beta": {"name": "beta"},
        "beta57": {"name": "beta", "alpha": 0.5, "beta": 0.7},
        "linear_quadratic": {"name": "linear_quadratic"},
        "kl_optimal": {"name": "kl_optimal"},
        "laplace": {"name": "laplace"},
        "bong_tangent": {"name": "bong_tangent"},
    }
)
"""Schedulers of ComfyUI; beta57 and bong_tangent are RES4LYF's."""

_ORDERS: Final = {n: {"order": n} for n in (1, 2, 3)}
_FORMS: Final = {"midpoint": {"solver_type": "midpoint"}, "heun": {"solver_type": "taylor"}}
_LOWERED: Final = {False: _NEVER_LOWERED, True: {_LOWER: "below_15_steps"}}
_ALWAYS_LOWERED: Final = {False: _NEVER_LOWERED, True: {_LOWER: "always"}}
_LINSPACE: Final = {"name": "linspace"}
_TO_THE_LAST_STRIDE: Final = {"name": "linspace", "endpoint": False}
_TWICE_SHIFTED: Final = {"name": "linspace", "twice_shifted": True}
_LEADING: Final = {"name": "leading", "offset": 0}

DIFFUSERS: Final[Mapping[str, Scheduler]] = MappingProxyType(
    {
        "DDIMScheduler": Scheduler({"name": "ddim"}, _LEADING),
        "DDPMScheduler": Scheduler({"name": "ddim", "eta": 1.0}, _LEADING),
        "PNDMScheduler": Scheduler({"name": "plms"}, _LEADING, {"skip_prk_steps": {True: {}}}),
        "EulerDiscreteScheduler": Scheduler({"name": "euler"}, _LINSPACE),
        "EulerAncestralDiscreteScheduler": Scheduler({"name": "euler_ancestral"}, _LINSPACE),
        "HeunDiscreteScheduler": Scheduler({"name": "heun"}, _LINSPACE),
        "KDPM2DiscreteScheduler": Scheduler({"name": "dpm_2"}, _LINSPACE),
        "KDPM2AncestralDiscreteScheduler": Scheduler({"name": "dpm_2", "eta": 1.0}, _LINSPACE),
        "LMSDiscreteScheduler": Scheduler({"name": "lms"}, _LINSPACE),
        "DPMSolverMultistepScheduler": Scheduler(
            {"name": "dpm_solver_pp"} | _LOWERED[True],
            _TO_THE_LAST_STRIDE,
            {
                "algorithm_type": {
                    "dpmsolver++": {"variant": "ode"},
                    "sde-dpmsolver++": {"variant": "sde"},
                },
                "solver_order": _ORDERS,
                "solver_type": _FORMS,
                "lower_order_final": _LOWERED,
            },
            multistep=True,
        ),
        "DPMSolverSinglestepScheduler": Scheduler(
            {"name": "dpm_solver_pp_singlestep"},
            _TO_THE_LAST_STRIDE,
            {
                "algorithm_type": {"dpmsolver++": {}},
                "solver_order": {n: {"order": n} for n in (2, 3)},
                "solver_type": _FORMS,
            },
            multistep=True,
        ),
        "DPMSolverSDEScheduler": Scheduler({"name": "dpm_solver_pp_sde"}, _LINSPACE),
        "UniPCMultistepScheduler": Scheduler(
            {"name": "unipc"} | _ALWAYS_LOWERED[True],
            _TO_THE_LAST_STRIDE,
            {
                "solver_order": _ORDERS,
                "solver_type": {one: {"variant": one} for one in ("bh1", "bh2")},
                "predict_x0": {True: {}},
                "lower_order_final": _ALWAYS_LOWERED,
            },
            multistep=True,
        ),
        "DEISMultistepScheduler": Scheduler(
            {"name": "deis"} | _LOWERED[True],
            _TO_THE_LAST_STRIDE,
            {
                "algorithm_type": {"deis": {}},
                "solver_order": _ORDERS,
                "solver_type": {"logrho": {}},
                "lower_order_final": _LOWERED,
            },
            multistep=True,
        ),
        "SASolverScheduler": Scheduler(
            {"name": "sa_solver"},
            _TO_THE_LAST_STRIDE,
            {
                "predictor_order": {n: {"predictor_order": n} for n in (1, 2, 3)},
                "corrector_order": {n: {"corrector_order": n} for n in (0, 2, 3)},
                "algorithm_type": {"data_prediction": {}},
            },
            multistep=True,
        ),
        "LCMScheduler": Scheduler(
            {"name": "lcm"},
            {"name": "lcm"},
            {"clip_sample": {False: {}}, "timestep_scaling": {10.0: {}}},
        ),
        "TCDScheduler": Scheduler({"name": "tcd"}, {"name": "lcm"}),
        "EDMEulerScheduler": Scheduler({"name": "euler"}, {"name": "karras"}),
        "EDMDPMSolverMultistepScheduler": Scheduler(
            {"name": "dpm_solver_pp"} | _LOWERED[True],
            {"name": "karras"},
            {
                "algorithm_type": {
                    "dpmsolver++": {"variant": "ode"},
                    "sde-dpmsolver++": {"variant": "sde"},
                },
                "solver_order": _ORDERS,
                "solver_type": _FORMS,
                "lower_order_final": _LOWERED,
            },
        ),
        "FlowMatchEulerDiscreteScheduler": Scheduler(
            {"name": "euler"},
            _TWICE_SHIFTED,
            {"stochastic_sampling": {False: {}, True: {"name": "lcm"}}},
        ),
        "FlowMatchHeunDiscreteScheduler": Scheduler({"name": "heun"}, _TWICE_SHIFTED),
        "FlowMatchLCMScheduler": Scheduler(
            {"name": "lcm"}, _TWICE_SHIFTED, {"scale_factors": {None: {}}}
        ),
        "SCMScheduler": Scheduler({"name": "lcm"}, {"name": "angles"}),
    }
)
"""Schedulers of diffusers by their class."""

_CFG_PLUS_PLUS: Final = "here CFG++ is a guidance rule, cfg_plus_plus, which works with any sampler"
CFG_PLUS_PLUS: Final[Mapping[str, Fields]] = MappingProxyType(
    {
        "euler_cfg_pp": {"name": "euler"},
        "euler_ancestral_cfg_pp": {"name": "euler_ancestral"},
        "DDIM CFG++": {"name": "ddim"},
    }
)
"""Samplers whose steps equal those of our samplers with the guidance `cfg_plus_plus`."""

_DEIS: Final = (
    "there the polynomials of the noise are fitted over time, but here over log sigma; the closest "
    "is deis with order 3"
)
_ADAPTIVE: Final = (
    "its number of steps depends on the image, but here a run is planned before it begins; the "
    "closest is dpm_fast"
)

LACKING: Final[Mapping[str, str]] = MappingProxyType(
    {
        "DPM adaptive": _ADAPTIVE,
        "DDIM CFG++": _CFG_PLUS_PLUS,
        "dpm_adaptive": _ADAPTIVE,
        "DEIS": _DEIS,
        "deis": _DEIS,
        "sa_solver": "there it corrects with order 4 and adds noise only in the middle of a run; "
        "the sampler of that name here adds it throughout",
        **dict.fromkeys(
            (
                "euler_cfg_pp",
                "euler_ancestral_cfg_pp",
                "dpmpp_2s_ancestral_cfg_pp",
                "dpmpp_2m_cfg_pp",
                "res_multistep_cfg_pp",
                "res_multistep_ancestral_cfg_pp",
                "gradient_estimation_cfg_pp",
            ),
            _CFG_PLUS_PLUS,
        ),
        "cfgpp_ud10_ab": "an undocumented blend of CFG++, two slopes and an extrapolation, with "
        "its own weights; the closest is lms with the guidance cfg_plus_plus",
    }
)
"""Samplers of the three programs that are missing here, with the reason or the nearest match."""

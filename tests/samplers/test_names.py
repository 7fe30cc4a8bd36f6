"""Names of other programs: complete, buildable, and written down in the documentation."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from embedded import MODEL_FOLDER
from samplers import SAMPLERS, SPACINGS, NoiseSchedule, Sampler, Spacing
from samplers.beta import Beta
from samplers.ddim import DDIM
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.euler import Euler, EulerAncestral
from samplers.exponential import Exponential
from samplers.names import NoEqual, label_of, named, of_diffusers, schedule_type, schedule_type_of
from samplers.other_names import (
    AUTOMATIC1111,
    COMFYUI,
    COMFYUI_SAMPLERS,
    DIFFUSERS,
    FORGE,
    FORGE_SCHEDULE_TYPES,
    LACKING,
    SCHEDULE_TYPES,
)
from samplers.timesteps import Karras, Leading, Linspace, LogSNR, SGMUniform, Trailing
from samplers.unipc import UniPC
from tests.covering import covering
from tests.samplers.cases import EDM, FLOW, SCHEDULES, TRIGFLOW

# As version 1.10 lists them: sd_samplers_kdiffusion, _timesteps, _lcm, and sd_schedulers.
THEIR_SAMPLERS = [
    *("DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE"),
    *("Euler a", "Euler", "LMS", "Heun", "DPM2", "DPM2 a", "DPM fast", "DPM adaptive", "Restart"),
    *("DDIM", "DDIM CFG++", "PLMS", "UniPC", "LCM"),
]
THEIR_SCHEDULE_TYPES = [
    *("Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal"),
    *("Align Your Steps", "Simple", "Normal", "DDIM", "Beta"),
]
# Forge's additional ones: its sd_samplers_kdiffusion, alter_samplers and sd_schedulers.
FORGES_SAMPLERS = ["HeunPP2", "IPNDM", "IPNDM_V", "DEIS", "DDPM"]
FORGES_SCHEDULE_TYPES = [
    *("Turbo", "Align Your Steps GITS", "Align Your Steps 11", "Align Your Steps 32"),
]
# As comfy/samplers.py lists them, without those of video models.
COMFYUIS_SAMPLERS = [
    *("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2"),
    *("exp_heun_2_x0", "exp_heun_2_x0_sde", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast"),
    *("dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde"),
    *("dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
    *("dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm"),
    *("lcm", "ipndm", "ipndm_v", "deis", "cfgpp_ud10_ab", "res_multistep"),
    *("res_multistep_cfg_pp", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp"),
    *("gradient_estimation", "gradient_estimation_cfg_pp", "er_sde", "seeds_2", "seeds_3"),
    *("sa_solver", "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2"),
]
COMFYUIS_SCHEDULERS = [
    *("simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal"),
    *("linear_quadratic", "kl_optimal"),
]
AS_DIFFUSERS = DPMSolverPP(lower_order_final="below_15_steps")
THREE_M_SDE = DPMSolverPP(order=3, variant="sde", solver_type="taylor", lower_order_final=False)
DOCUMENT = (Path(__file__).parents[2] / "docs/names.md").read_text("utf-8")


def test_every_sampler_of_automatic1111_is_mapped_or_named_as_lacking() -> None:
    for label in THEIR_SAMPLERS:
        assert (label in AUTOMATIC1111) != (label in LACKING), label
    assert set(AUTOMATIC1111) <= set(THEIR_SAMPLERS)


def test_every_schedule_type_of_automatic1111_is_mapped() -> None:
    for label in THEIR_SCHEDULE_TYPES:
        assert label in SCHEDULE_TYPES, label
    # The last is the one that its LCM sampler uses.
    assert set(SCHEDULE_TYPES) <= {*THEIR_SCHEDULE_TYPES, "LCM"}


def test_every_name_of_forge_is_mapped_or_named_as_lacking() -> None:
    for label in FORGES_SAMPLERS:
        assert (label in FORGE) != (label in LACKING), label
    assert set(FORGE_SCHEDULE_TYPES) == set(FORGES_SCHEDULE_TYPES)
    for label, kind in product(FORGE, FORGE_SCHEDULE_TYPES):
        sampler, spacing = named(f"{label} {kind}")
        assert spacing is not None
        plan = sampler.plan(SCHEDULES["scaled_linear"].grid(spacing, 10))
        assert np.isfinite(plan.tables).all()


@pytest.mark.parametrize(
    ("label", "levels"),
    [("Align Your Steps GITS", [14.615, 4.617, 2.507, 1.236]), ("Align Your Steps 32", [14.615])],
)
def test_levels_of_a_table_are_as_listed(label: str, levels: list[float]) -> None:
    grid = SCHEDULES["scaled_linear"].grid(schedule_type(label), 10)
    sigmas = grid.sigma / grid.alpha
    # The schedule's own noisiest level is 14.6146.
    np.testing.assert_allclose(sigmas[: len(levels)], levels, rtol=5e-5)


def test_every_name_of_comfyui_is_mapped_or_named_as_lacking() -> None:
    for name in COMFYUIS_SAMPLERS:
        assert (name.removesuffix("_gpu") in COMFYUI_SAMPLERS) != (name in LACKING), name
    assert set(COMFYUIS_SCHEDULERS) <= set(COMFYUI)


def test_every_scheduler_named_is_one_of_diffusers() -> None:
    for name in DIFFUSERS:
        assert hasattr(diffusers, name), name


def test_every_name_of_automatic1111_builds_a_plan() -> None:
    kinds = [*(kind for kind in SCHEDULE_TYPES if kind != "LCM"), "Automatic", None]
    for label, kind in covering(product(AUTOMATIC1111, kinds), tuple):
        sampler, spacing = named(label if kind is None else f"{label} {kind}")
        assert (spacing is None) == (kind is None)
        layout = spacing or sampler.default_spacing
        plan = sampler.plan(SCHEDULES["scaled_linear"].grid(layout, 10))
        assert np.isfinite(plan.tables).all(), f"{label} {kind}"


def test_every_name_of_diffusers_builds_a_plan() -> None:
    for name in DIFFUSERS:
        sampler, spacing = of_diffusers({"_class_name": name})
        assert named(name) == (sampler, spacing)
        schedule = {"EDM": EDM, "Flo": FLOW, "SCM": TRIGFLOW}.get(name[:3], SCHEDULES["linear"])
        assert np.isfinite(sampler.plan(schedule.grid(spacing, 10)).tables).all(), name


@pytest.mark.parametrize("name", [name for name, one in DIFFUSERS.items() if one.options])
def test_every_option_of_diffusers_is_one_of_theirs_and_acts(name: str) -> None:
    theirs: Any = getattr(diffusers, name)(**({"skip_prk_steps": True} if "PNDM" in name else {}))
    for option, values in DIFFUSERS[name].options.items():
        assert option in theirs.config, option
        assert theirs.config[option] in values, option
        for value, fields in values.items():
            sampler, _ = of_diffusers({"_class_name": name, option: value})
            assert all(getattr(sampler, key) == given for key, given in fields.items())


@pytest.mark.parametrize(
    ("text", "sampler", "spacing"),
    [
        ("DPM++ 2M Karras", DPMSolverPP(lower_order_final=False), Karras()),
        (
            "dpm++ 2m sde exponential",
            DPMSolverPP(variant="sde", lower_order_final=False),
            Exponential(),
        ),
        ("DPM++ 3M SDE", THREE_M_SDE, None),
        ("DPM++ 3M SDE Automatic", THREE_M_SDE, Exponential()),
        ("k_euler_a", EulerAncestral(), None),
        ("Euler a SGM Uniform", EulerAncestral(), SGMUniform()),
        ("Euler Beta", Euler(), Beta(over="sigma")),
        (" UniPC ", UniPC(order=3, variant="bh1", lower_order_final="always"), None),
        ("DDIM DDIM", DDIM(), Leading()),
        ("EulerDiscreteScheduler", Euler(), Linspace()),
        ("dpmpp_2m_sde_gpu", DPMSolverPP(variant="sde", lower_order_final=False), None),
    ],
)
def test_names_stand_for(text: str, sampler: Sampler, spacing: Spacing | None) -> None:
    assert named(text) == (sampler, spacing)


@pytest.mark.parametrize(
    ("config", "sampler", "spacing"),
    [
        ({}, AS_DIFFUSERS, Linspace(endpoint=False)),
        ({"use_karras_sigmas": True}, AS_DIFFUSERS, Karras(whole=True)),
        (
            {"use_lu_lambdas": True, "solver_order": 3},
            AS_DIFFUSERS.model_copy(update={"order": 3}),
            LogSNR(whole=True),
        ),
        ({"use_exponential_sigmas": True}, AS_DIFFUSERS, Exponential()),
        ({"use_beta_sigmas": True}, AS_DIFFUSERS, Beta(over="sigma")),
        (
            {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
            DPMSolverPP(variant="sde", solver_type="taylor", lower_order_final="below_15_steps"),
            Linspace(endpoint=False),
        ),
        ({"timestep_spacing": "trailing"}, AS_DIFFUSERS, Trailing()),
        (
            {"timestep_spacing": "leading", "steps_offset": 1, "lower_order_final": False},
            DPMSolverPP(lower_order_final=False),
            Leading(offset=1, endpoint=False),
        ),
        ({"timestep_spacing": "linspace"}, AS_DIFFUSERS, Linspace(endpoint=False)),
    ],
    ids=str,
)
def test_options_of_a_scheduler_are_read(
    config: dict[str, Any], sampler: Sampler, spacing: Spacing
) -> None:
    full = {"_class_name": "DPMSolverMultistepScheduler"} | config
    assert of_diffusers(full) == (sampler, spacing)


def test_the_embedded_models_own_scheduler_is_known() -> None:
    config = json.loads((MODEL_FOLDER / "scheduler/scheduler_config.json").read_text())
    sampler, spacing = of_diffusers(config)
    assert (sampler, spacing) == (DDIM(), Trailing())
    theirs: Any = diffusers.DDIMScheduler.from_config(config)
    theirs.set_timesteps(7)
    grid = NoiseSchedule.from_diffusers(config).grid(spacing, 7)
    assert grid.t[:-1].tolist() == theirs.timesteps.tolist()


def test_what_is_lacking_is_said_with_its_reason() -> None:
    for name, reason in LACKING.items():
        with pytest.raises(NoEqual, match=r" has no equivalent here: ") as caught:
            named(name)
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"algorithm_type": "dpmsolver"},
            "algorithm_type of DPMSolverMultistepScheduler is 'dpms",
        ),
        (
            {"thresholding": True},
            "thresholding of DPMSolverMultistepScheduler is True, which has no equivalent",
        ),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type of DPMSolverMultistepScheduler is"),
    ],
    ids=str,
)
def test_options_without_an_equal_are_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(NoEqual, match=f"^{sentence}"):
        of_diffusers({"_class_name": "DPMSolverMultistepScheduler"} | config)


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(ValueError, match=r"similar names are: DPM\+\+ 2M") as caught:
        named("DPM++2M")
    assert not isinstance(caught.value, NoEqual)
    with pytest.raises(ValueError, match=r"^sampler 'qqqq' is not a name in .* diffusers\.$"):
        named("qqqq")
    with pytest.raises(ValueError, match=r"similar names are: DDIMScheduler"):
        of_diffusers({"_class_name": "DDIMSheduler"})
    with pytest.raises(
        ValueError, match=r"^spacing 'Karas' is not a name .* similar names are: Karras"
    ):
        schedule_type("Karas")


def test_labels_survive_the_way_there_and_back() -> None:
    assert [label_of(named(label)[0]) for label in AUTOMATIC1111] == [*AUTOMATIC1111]


def test_labels_of_what_has_none_are_our_names() -> None:
    assert label_of(DPMSolverPP(order=3)) == "dpm_solver_pp"
    assert label_of(DPMSolverPP(order=3, variant="sde")) == "dpm_solver_pp"
    assert label_of(DPMSolverPP(lower_order_final=False)) == "DPM++ 2M"
    assert label_of(UniPC()) == "UniPC"
    assert schedule_type_of(Karras(rho=5.0)) == "Karras"
    assert schedule_type_of(Beta()) == "beta"
    assert schedule_type_of(schedule_type("sgm_uniform")) == "SGM Uniform"
    assert schedule_type_of(LogSNR()) == "logsnr"
    assert schedule_type_of(Trailing()) == schedule_type_of(schedule_type("Simple")) == "Simple"


def test_names_of_ours_in_the_tables_are_registered() -> None:
    tables = (*AUTOMATIC1111.values(), *DIFFUSERS.values())
    samplers = {kind.model_fields["name"].default for kind in SAMPLERS}
    spacings = {kind.model_fields["name"].default for kind in SPACINGS}
    assert {one.fields["name"] for one in tables} <= samplers
    schedules = (*SCHEDULE_TYPES.values(), *COMFYUI.values())
    assert {fields["name"] for fields in schedules} <= spacings


def written(fields: Any) -> str:
    """Our side of a row, as in a request."""
    return f"`{fields['name']}`" if len(fields) == 1 else f"`{json.dumps(dict(fields))}`"


def tables() -> list[str]:
    """The tables of the document."""
    samplers = ['| AUTOMATIC1111\'s sampler | here | "Automatic" is |', "|---|---|---|"]
    samplers += [f"| {a} | {written(b.fields)} | {b.automatic} |" for a, b in AUTOMATIC1111.items()]
    types = ["| AUTOMATIC1111's schedule type | here |", "|---|---|"]
    types += [f"| {a} | {written(b)} |" for a, b in SCHEDULE_TYPES.items()]
    forge = ["| Forge's sampler or schedule type | here |", "|---|---|"]
    forge += [f"| {a} | {written(b.fields)} |" for a, b in FORGE.items()]
    forge += [f"| {a} | {written(b)} |" for a, b in FORGE_SCHEDULE_TYPES.items()]
    theirs = ["| ComfyUI's sampler | here |", "|---|---|"]
    theirs += [f"| {a} | {written(b)} |" for a, b in COMFYUI_SAMPLERS.items()]
    comfyui = ["| ComfyUI's scheduler | here |", "|---|---|"]
    comfyui += [f"| {a} | {written(b)} |" for a, b in COMFYUI.items()]
    schedulers = ["| diffusers' scheduler | here | its spacing by default | options read |"]
    schedulers += ["|---|---|---|---|"]
    schedulers += [
        f"| {name} | {written(one.fields)} | {written(one.spacing)} | {', '.join(one.options)} |"
        for name, one in DIFFUSERS.items()
    ]
    lacking = ["| there | why not here |", "|---|---|"]
    lacking += [f"| {name} | {why} |" for name, why in LACKING.items()]
    found = (samplers, types, forge, theirs, comfyui, schedulers, lacking)
    return ["\n".join(table) for table in found]


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.splitlines()[0])
def test_the_document_has_the_tables_as_they_are(table: str) -> None:
    assert f"\n\n{table}\n\n" in DOCUMENT

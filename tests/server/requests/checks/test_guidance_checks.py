"""Which guidance is refused, and with which messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from typing_extensions import override

from guidance import POLICIES, Policy
from guidance.linear_adaptive import TERMS
from guidance.linear_fit import LinearFit
from server.errors import InvalidRequest
from server.models.linear_fits import LinearFits, fit_file, identity_of
from server.requests.checks.guidance import check_windows, coefficients_for
from server.requests.choice import name_of
from server.requests.resolve import Prepared, make_plan, prepare, resolve
from server.requests.schema import GenerateRequest, ResolvedRequest, split
from server.settings import Limits
from tests.server.toy_model import Toy


def resolved(model: Toy, *, has_picture: bool = False, **fields: Any) -> ResolvedRequest:
    request = GenerateRequest.model_validate({"prompt": "x", "steps": 6, **fields})
    return resolve(request, model, Limits(), (32, 32) if has_picture else None)


def planned(request: ResolvedRequest) -> Prepared:
    model = Toy()
    layout = request.sampler, request.spacing, request.steps, request.strength
    return prepare(request, model, make_plan(model.default_schedule, *layout))


def refusal(model: Toy, **guidance: Any) -> tuple[str | None, str]:
    with pytest.raises(InvalidRequest) as caught:
        resolved(model, guidance={"name": "cfg", **guidance})
    return caught.value.field, caught.value.message


def test_what_goes_together_passes() -> None:
    model = Toy()
    for guidance in (
        {"name": "cfg", "policy": "reuse"},
        {"name": "cfg", "policy": "embedded"},
        {"name": "apg", "policy": {"name": "residual", "mode": "onetime"}},
        {"name": "perp_neg", "policy": "adaptive"},
        {"name": "perp_neg", "policy": "reuse"},
        {"name": "perp_neg", "policy": "linear_adaptive"},
        {"name": "perp_neg", "policy": {"name": "residual", "mode": "onetime"}},
        {"name": "none", "perturbed": ["pag", "autoguidance"], "skip_tuning": {}},
    ):
        assert resolved(model, guidance=guidance).guidance.name == guidance["name"]
    assert resolved(model, has_picture=True, guidance={"name": "cfg", "policy": "residual"})


@pytest.mark.parametrize("policy", [p for p in POLICIES if name_of(p) != "always"])
def test_no_policy_but_always_goes_without_a_branch(policy: type[Policy]) -> None:
    name = name_of(policy)
    assert refusal(Toy(), name="none", policy=name) == (
        "guidance.policy",
        f"guidance.policy is {name!r}; the rule 'none' makes one prediction only; leave the policy "
        "out.",
    )


def test_a_picture_cannot_stand_for_several_predictions() -> None:
    assert refusal(Toy(), name="perp_neg", policy="residual") == (
        "guidance.policy",
        "guidance.policy is 'residual'; with these parameters it supports at most 1 second "
        "prediction, but the rule 'perp_neg' has 2.",
    )


def test_residual_guidance_of_itself_needs_a_picture() -> None:
    assert refusal(Toy(), policy="residual") == (
        "guidance.policy",
        "guidance.policy is 'residual'; with these parameters it needs a picture to start from; "
        'send `image`, or set "mode": "onetime".',
    )


def test_guidance_inside_the_network_needs_a_network_that_is_told() -> None:
    assert refusal(Toy(embeds_scale=False), policy="embedded") == (
        "guidance.policy",
        "guidance.policy is 'embedded'; model 'toy' does not take a guidance scale as input (its "
        "config has neither `time_cond_proj_dim` nor `guidance_embeds`); choose another policy.",
    )
    assert refusal(Toy(), name="apg", policy="embedded") == (
        "guidance.policy",
        "guidance.policy is 'embedded'; the network applies 'cfg' itself, so it is incompatible "
        "with 'apg'.",
    )


def test_a_change_that_the_model_cannot_make_is_refused_by_its_place() -> None:
    layers = {"name": "slg", "layers": ["none"]}
    assert refusal(Toy(), perturbed=["pag", layers]) == (
        "guidance.perturbed.1",
        "guidance.perturbed.1: model 'toy' has no layer 'none'; it has middle.",
    )

    class Plain(Toy):
        def refuses(self, edit: Any) -> str:
            return "has no skip connections to scale"

    assert refusal(Plain(), skip_tuning={}) == (
        "guidance.skip_tuning",
        "guidance.skip_tuning: model 'toy' has no skip connections to scale.",
    )


def test_prompts_of_a_rule_are_counted_too() -> None:
    prompts = [{"prompt": "word " * 30}]
    assert refusal(Toy(), name="composed", prompts=prompts) == (
        "guidance",
        "guidance has 30 tokens; model 'toy' takes at most 20.",
    )


def test_a_window_that_holds_no_step_is_refused() -> None:
    model = Toy()
    request = resolved(model, steps=4, guidance={"name": "cfg", "perturbed": ["pag", "slg"]})
    plan = make_plan(model.default_schedule, request.sampler, request.spacing, 4, None)
    with pytest.raises(InvalidRequest) as caught:
        check_windows(request.guidance, plan)
    assert caught.value.field == "guidance.perturbed.1"
    assert caught.value.message == (
        "guidance.perturbed.1: none of the 4 steps lies within its window; take more steps, or "
        "widen low, high, start or stop."
    )
    longer = make_plan(model.default_schedule, request.sampler, request.spacing, 10, None)
    check_windows(request.guidance, longer)


@pytest.mark.parametrize("rule", ["cfg", "perp_neg"])
def test_an_interval_that_holds_no_step_is_refused(rule: str) -> None:
    policy = {"name": "interval", "low": 0.0, "start": 0.05, "stop": 0.1}
    with pytest.raises(InvalidRequest) as caught:
        planned(resolved(Toy(), guidance={"name": rule, "policy": policy}))
    assert caught.value.field == "guidance.policy"
    assert caught.value.message == (
        "guidance.policy: none of the 6 steps lies within its window; take more steps, or widen "
        "low, high, start or stop."
    )


class Idle(Policy, frozen=True):
    """A policy of another package that never guides."""

    summary: ClassVar[str] = "For tests."
    source: ClassVar[str] = "None."
    name: Literal["idle"] = "idle"

    @override
    def evaluates(self, noise_ratio: Any, progress: Any) -> Any:
        return np.zeros(len(noise_ratio), np.bool_)


class Trained(Idle, frozen=True):
    """A policy of another package that only that package can fit."""

    fitted: ClassVar[int] = 3
    estimates: ClassVar[bool] = True
    name: Literal["trained"] = "trained"  # type: ignore[assignment]


def with_policy(policy: Policy) -> ResolvedRequest:
    request = GenerateRequest.model_validate({"prompt": "x", "steps": 6, "guidance": "cfg"})
    assert request.guidance is not None
    guidance = request.guidance.model_copy(update={"policy": policy})
    return resolve(request.model_copy(update={"guidance": guidance}), Toy(), Limits(), None)


def test_a_policy_that_guides_no_step_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        planned(with_policy(Idle()))
    assert (caught.value.field, caught.value.message) == (
        "guidance.policy",
        "guidance.policy is 'idle'; with these parameters it guides at none of the 6 steps.",
    )


def test_a_policy_that_nothing_here_can_fit_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        with_policy(Trained())
    assert (caught.value.field, caught.value.message) == (
        "guidance.policy",
        "guidance.policy is 'trained'; it needs coefficients fitted beforehand, and this server "
        "has no command that fits it.",
    )


def asked(model: Toy, **fields: Any) -> np.ndarray | None:
    request = resolved(model, has_picture="strength" in fields, **fields)
    layout = request.sampler, request.spacing, request.steps, request.strength
    return coefficients_for(request, model, make_plan(model.default_schedule, *layout))


LINEAR: dict[str, Any] = {"guidance": {"name": "cfg", "scale": 4.0, "policy": "linear_adaptive"}}


def test_coefficients_are_those_of_the_run_and_of_no_other(tmp_path: Path) -> None:
    model = Toy()
    model.linear_fits = LinearFits(tmp_path)
    request = resolved(model, **LINEAR)
    plan = make_plan(model.default_schedule, request.sampler, request.spacing, 6, None)
    identity = identity_of(model.facts.denoiser, plan, split(request.guidance)[0], every=2)
    with pytest.raises(InvalidRequest) as caught:
        asked(model, **LINEAR)
    assert caught.value.field == "guidance.policy"
    assert caught.value.message == (
        "guidance.policy is 'linear_adaptive', and it is not fitted to this sampler, spacing, "
        "steps and guidance of model 'toy'; fit it with `weft linear-ag --model PATH --steps 6 "
        "--every 2 --sampler dpm_solver_pp --spacing trailing --guidance cfg`, or choose another "
        "policy (nothing is fitted)."
    )

    # A file that is added while the server runs is found.
    made = LinearFit(np.arange(6.0 * TERMS).reshape(6, TERMS), identity, 8, np.ones(6))
    (tmp_path / "weft").mkdir()
    (tmp_path / "weft" / "linear-ag-broken.safetensors").write_bytes(b"no")
    made.save(fit_file(tmp_path, "dpm_solver_pp", 6, identity))
    found = asked(model, **LINEAR)
    assert found is not None
    assert np.array_equal(found, made.coefficients)

    with pytest.raises(InvalidRequest) as caught:
        asked(model, **{**LINEAR, "steps": 7})
    assert caught.value.message.endswith(
        "or choose another policy (fitted are: dpm_solver_pp, 6 steps, cfg at scale 4, every 2)."
    )

    others = (
        {"steps": 7},
        {"sampler": "ddim"},
        {"spacing": "karras"},
        {"guidance": {**LINEAR["guidance"], "scale": 5.0}},
        {"guidance": {**LINEAR["guidance"], "policy": {"name": "linear_adaptive", "every": 3}}},
    )
    for other in others:
        with pytest.raises(InvalidRequest, match="is not fitted to this sampler"):
            asked(model, **{**LINEAR, **other})
    retrained = Toy(denoiser="0" * 16)
    retrained.linear_fits = LinearFits(tmp_path)
    with pytest.raises(InvalidRequest, match="is not fitted to this sampler"):
        asked(retrained, **LINEAR)


@pytest.mark.parametrize(("stages", "terms"), [(5, TERMS), (6, TERMS + 1), (6, 2 * TERMS)])
def test_a_file_of_other_stages_or_branches_than_it_says_is_refused_by_the_check(
    stages: int, terms: int, tmp_path: Path
) -> None:
    model = Toy()
    model.linear_fits = LinearFits(tmp_path)
    request = resolved(model, **LINEAR)
    plan = make_plan(model.default_schedule, request.sampler, request.spacing, 6, None)
    identity = identity_of(model.facts.denoiser, plan, split(request.guidance)[0], every=2)
    damaged = LinearFit(np.ones((stages, terms)), identity, 8, np.ones(stages))
    damaged.save(fit_file(tmp_path, "dpm_solver_pp", 6, identity))
    with pytest.raises(InvalidRequest) as caught:
        asked(model, **LINEAR)
    assert caught.value.field == "guidance.policy"
    assert caught.value.message == (
        f"guidance.policy is 'linear_adaptive'; it needs coefficients of shape (6, {TERMS}), and "
        f"was given ({stages}, {terms}). A file of the model's folder is damaged; fit it again "
        "with `weft linear-ag --model PATH --steps 6 --every 2 --sampler dpm_solver_pp --spacing "
        "trailing --guidance cfg`, or choose another policy."
    )


def test_the_command_names_what_differs_from_the_defaults() -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked(
            Toy(),
            sampler={"name": "dpm_solver_pp", "order": 3},
            guidance={**LINEAR["guidance"], "scale": 7.5},
        )
    assert (
        """--sampler '{"name": "dpm_solver_pp", "order": 3}' --spacing trailing """
        """--guidance '{"name": "cfg", "scale": 7.5}'`"""
    ) in caught.value.message


def test_a_run_from_a_picture_part_way_is_told_to_start_whole() -> None:
    with pytest.raises(InvalidRequest, match="; use `strength` 1, which runs all steps, or choose"):
        asked(Toy(), strength=0.5, **LINEAR)


def test_policies_that_need_nothing_are_given_nothing() -> None:
    assert asked(Toy(), guidance={"name": "cfg", "policy": "reuse"}) is None
    alone = {"name": "cfg", "scale": 1.0, "policy": "linear_adaptive"}
    assert asked(Toy(), guidance=alone) is None

"""Preparation of requests: fills in what they leave out, checks them and plans them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from samplers import Plan, StatisticsIdentity
from server.lru import ByteBoundedLRU
from server.models.hosted import HostedModel
from server.plugin_faults import containing_exits
from server.requests.chosen import notes_for
from server.requests.prompt_editing import timelines_of
from server.requests.resolve import Prepared, make_plan, prepare, resolve, statistics_for
from server.requests.schema import GenerateRequest, ResolvedRequest
from server.requests.second_run import naming_hires, new_warnings, second_run
from server.settings import Limits

__all__ = ["Planner"]

PLAN_CACHE_BYTES = 512 * 2**20
"""Bound on cached plans: an elementwise plan of dpm_solver_v3 in 25 steps at 1024 x 1024 pixels has
up to 367 MB."""


class Planner:
    """Prepares requests, and caches the plans that they may share; safe from any thread.

    Args:
        limits: limits for one request, set by the operator.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._plans: ByteBoundedLRU[Hashable, Plan] = ByteBoundedLRU(
            PLAN_CACHE_BYTES, lambda plan: plan.tables.nbytes
        )

    @containing_exits()
    def prepare(
        self,
        request: GenerateRequest,
        model: HostedModel,
        size: tuple[int, int] | None,
        reference_size: tuple[int, int] | None = None,
    ) -> tuple[Prepared, StatisticsIdentity | None]:
        """Fill in what a request leaves out, check it and plan it.

        Args:
            request: request as sent.
            model: model that will serve it.
            size: width and height of the image that it starts from; None without one.
            reference_size: see :func:`server.requests.resolve.resolve`.

        Returns:
            The prepared request, and the model statistics that its sampler is planned with, if any.

        Raises:
            InvalidRequest: the model or the operator does not allow a value.
            WeftError: a plug-in failed.
        """
        resolved = resolve(request, model, self._limits, size, reference_size)
        fitted_to = statistics_for(resolved, model)
        plan = self._plan(resolved, model, fitted_to)
        prepared = prepare(resolved, model, plan)
        second = self._second(resolved, model)
        again = () if second is None else new_warnings(prepared.warnings, second.warnings)
        whole = replace(
            prepared,
            warnings=(*prepared.warnings, *again),
            notes=notes_for(request, resolved, model),
            second=second,
        )
        return whole, fitted_to

    def _second(self, resolved: ResolvedRequest, model: HostedModel) -> Prepared | None:
        """The second run of a request with `hires`."""
        if resolved.hires is None:
            return None
        second = second_run(resolved, model.facts, self._limits)
        with naming_hires():
            plan = self._plan(second, model, statistics_for(second, model))
            prepared = prepare(second, model, plan)
        return replace(prepared, timeline=timelines_of(resolved)[1])

    def _plan(
        self, resolved: ResolvedRequest, model: HostedModel, identity: StatisticsIdentity | None
    ) -> Plan:
        size = resolved.width, resolved.height
        schedule, shape = model.schedule(*size, resolved.steps), model.latent_shape(*size)
        layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength

        def make() -> Plan:
            statistics = None if identity is None else model.statistics.load(identity, shape)
            return make_plan(schedule, *layout, statistics)

        key = model.facts.name, schedule, layout, identity, identity and shape
        return self._plans.get(key, make)

"""One cell repeated with diffusers' own pipeline and scheduler, as an independent check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from embedded import MODEL_FOLDER
from samplers.dpm_solver_pp import DPMSolverPP
from samplers.timesteps import Linspace
from server.engine.state.noise import start_noise

if TYPE_CHECKING:
    from torch import Tensor

    from samplers import NoiseSchedule, Plan

STEPS = 9
"""999 / 9 is an integer, so that equal strides are whole timesteps, which diffusers requires."""
ORDERS = (2, 3)


def plan_of_order(order: Literal[2, 3], schedule: NoiseSchedule) -> Plan:
    """DPM-Solver++ at whole timesteps, from the noisiest trained level to the cleanest."""
    grid = schedule.grid(Linspace(), STEPS, t_end=schedule.t_end)
    return DPMSolverPP(order=order, lower_order_final="below_15_steps").plan(grid)


def theirs(order: int, plan: Plan, prompts: list[str], scale: float) -> Tensor:
    """Latents from diffusers' pipeline with the same start noise, ``[images, C, h, w]``."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(MODEL_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, solver_order=order, final_sigmas_type="sigma_min"
    )
    shape = (pipeline.unet.config.in_channels, *[pipeline.unet.config.sample_size] * 2)
    return pipeline(
        prompts,
        timesteps=[int(t) for t in plan.t[:-1]],
        guidance_scale=scale,
        latents=torch.stack([start_noise(seed, shape) for seed in range(len(prompts))]),
        output_type="latent",
    ).images

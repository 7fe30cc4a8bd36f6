"""Measure how long one picture takes from the command line, compared with a plain diffusers script.

    python -m benchmarks.first_picture --runs 5

Each starts in its own process, loads the embedded model from disk and draws one picture in 25 steps
with guidance. They take turns, so that a slowdown of the machine favors neither. Prints a Markdown
table of medians. Processor time counts all threads and is less affected by other load.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import import_module
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS: Final = 25
SCALE: Final = 4.0
PROMPT: Final = "a red circle"
WEFT: Final = ("-c", "from server.cli import main; main()")


def main() -> None:
    """Run all commands in turn and print the table, or be the plain script."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_picture")
    parser.add_argument("--runs", type=int, default=5, help="of each")
    parser.add_argument("--plain", metavar="FOLDER", help="be the plain script, with this model")
    options = parser.parse_args()
    if options.plain is not None:
        draw(options.plain)
    else:
        print(table(options.runs))


def table(runs: int) -> str:
    """The table of medians over a number of runs of each command."""
    from server.models.folder import embedded_folders

    folder = str(embedded_folders()["embedded"])
    with TemporaryDirectory() as out:
        picture = ("--output", f"{out}/picture.png", "--force")
        commands = {
            "plain script": ("-m", "benchmarks.first_picture", "--plain", folder),
            "`weft generate`": (*WEFT, "generate", PROMPT, "--steps", str(STEPS), *picture),
            "`weft --help`": (*WEFT, "--help"),
        }
        spent = {name: [_seconds(commands[name])] for name in commands}
        for _ in range(runs - 1):
            for name, command in commands.items():
                spent[name].append(_seconds(command))
    lines = ["| command | processor time | wall time |", "|---|---|---|"]
    for name, seconds in spent.items():
        processor, wall = (median(one) for one in zip(*seconds, strict=True))
        lines.append(f"| {name} | {processor:.2f} s | {wall:.2f} s |")
    return "\n".join(lines)


def _seconds(arguments: Sequence[str]) -> tuple[float, float]:
    """Processor time and wall time of Python with these arguments."""
    before, began = getrusage(RUSAGE_CHILDREN), perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    wall, after = perf_counter() - began, getrusage(RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall


def draw(folder: str) -> None:
    """Draw one picture with a minimum of diffusers and transformers; it is not written."""
    import torch

    # Not all of their types are known to the type checker.
    diffusers: Any = import_module("diffusers")
    transformers: Any = import_module("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    denoiser = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    decoder = diffusers.AutoencoderTiny.from_pretrained(folder, subfolder="vae")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    texts = tokenizer([PROMPT, ""], padding="max_length", truncation=True, return_tensors="pt")
    scheduler.set_timesteps(STEPS)
    config = denoiser.config
    with torch.inference_mode():
        told = encoder(texts.input_ids)[0]
        x = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
        for t in scheduler.timesteps:
            cond, uncond = denoiser(torch.cat([x, x]), t, told).sample.chunk(2)
            x = scheduler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
        decoder.decode(x / decoder.config.scaling_factor)


if __name__ == "__main__":
    main()

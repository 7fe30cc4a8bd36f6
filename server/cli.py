"""The command line: `weft serve`, `generate`, `catalog`, `ems` and `linear-ag`.

Heavy modules are imported only by the command that needs them, so that `--help` is instant.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, TypeAlias, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from server.plain_flags import PlainCommand, PlainGroup

if TYPE_CHECKING:
    from rich.progress import Progress

    from server.requests.catalog import Entry
    from server.requests.schema import GenerateRequest
    from server.service.pictures import Pictures
    from server.settings import Settings

__all__ = ["main"]

log = logging.getLogger(__name__)

Result = TypeVar("Result")
ProgressCallback: TypeAlias = Callable[[str, int, int], None]

app = typer.Typer(
    cls=PlainGroup,
    help="Weft: a diffusion server that batches requests with different samplers and guidance.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)

INTERRUPTED: Final = 130
"""Exit status of a process that Ctrl-C ended, as in shells."""

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="Model folder or .safetensors checkpoint, as PATH or NAME=PATH, or ORG/NAME@REVISION "
        "of the Hugging Face hub; repeat the option to host several.",
        show_default="the embedded models",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Device to run on: auto, cpu, cuda or cuda:N.", show_default="auto"),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Model precision: auto, float32, float16 or bfloat16.",
        show_default="auto: float32 on a CPU, float16 or bfloat16 by family on a GPU",
    ),
]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic",
        help="Make every image bit-identical whatever else is in its batch; costs some speed.",
        show_default="off",
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile",
        help="Compile the repeated blocks of denoisers in the background; needs a C++ compiler.",
        show_default="off",
    ),
]
RowBudget = Annotated[
    int | None,
    typer.Option(
        help="Maximum rows (noisy latents, each with its own prompt and timestep) in one forward "
        "pass of the denoiser. Each has as many as its measured cost suggests.",
        show_default="128",
    ),
]
Adapters = Annotated[
    Path | None,
    typer.Option(help="Folder with LoRA files, NAME.safetensors, or folders that peft saved."),
]
Controls = Annotated[
    Path | None,
    typer.Option(
        help="Folder with ControlNets, each a folder NAME or a file NAME.safetensors, that "
        "requests may name."
    ),
]
Embeddings = Annotated[
    Path | None,
    typer.Option(help="Folder with embeddings, NAME.safetensors, that prompts may name."),
]
ImagePrompts = Annotated[
    Path | None,
    typer.Option(
        help="Folder with IP-Adapters, NAME.safetensors, that requests may name, and their image "
        "encoders, each a folder."
    ),
]
Vaes = Annotated[
    list[str] | None,
    typer.Option(
        "--vae",
        help="NAME=PATH of an autoencoder in place of that of a model; repeat for several.",
    ),
]
TinyVaes = Annotated[
    list[str] | None,
    typer.Option(
        "--tiny-vae",
        help="NAME=PATH of a tiny autoencoder beside that of a model, for requests that ask for "
        "it; repeat for several.",
    ),
]
Denoisers = Annotated[
    list[str] | None,
    typer.Option(
        "--denoiser",
        help="NAME=PATH of a U-Net or transformer in one .safetensors or .gguf file in place of "
        "that of a model; repeat for several.",
    ),
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        help="Python file whose samplers, spacings and parts of guidance are added to Weft's own; "
        "repeat the option for several.",
    ),
]
Described = "a name, or a JSON object with its fields."
Pictured = "NAME=FILE, NAME=FILE:SCALE or a JSON object whose `image` is a file"


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, _end_at_once)
    app()


def _end_at_once(*_: object) -> None:
    """End at Ctrl-C, without the usual exception.

    torch does not survive one during its import, and a thread that loads or runs a model does not
    survive one while the interpreter shuts down. Files are written completely or not at all. `weft
    serve` installs its own handlers once it serves.
    """
    console.show_cursor()
    os._exit(INTERRUPTED)


@app.command(cls=PlainCommand)
def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on.", show_default="8000")
    ] = None,
    model: Models = None,
    vae: Vaes = None,
    tiny_vae: TinyVaes = None,
    denoiser: Denoisers = None,
    adapters: Adapters = None,
    embeddings: Embeddings = None,
    controls: Controls = None,
    image_prompts: ImagePrompts = None,
    device: Device = None,
    dtype: Dtype = None,
    deterministic: Deterministic = None,
    compile_blocks: Compile = None,
    row_budget: RowBudget = None,
    plugin: Plugins = None,
    max_pending: Annotated[
        int | None,
        typer.Option(
            help="Maximum images queued or running; beyond it requests get 429.",
            show_default="1024",
        ),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(
            "--insecure",
            help="Allow a non-loopback address without API keys.",
            show_default="off",
        ),
    ] = None,
) -> None:
    """Start the HTTP server.

    Every setting is also an environment variable, WEFT_PORT for --port, and those without an
    option are documented in docs/operating.md: WEFT_API_KEYS, WEFT_DRAIN_S and others.
    """
    registered = _register(plugin)
    settings = _settings(
        host=host,
        port=port,
        models=model,
        vaes=vae,
        tiny_vaes=tiny_vae,
        denoisers=denoiser,
        adapters=adapters,
        embeddings=embeddings,
        controls=controls,
        image_prompts=image_prompts,
        device=device,
        dtype=dtype,
        deterministic=deterministic,
        compile=compile_blocks,
        row_budget=row_budget,
        max_pending=max_pending,
        insecure=insecure,
    )
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(message)s")
    for talkative in ("alembic", "httpx2"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    from server.environment import unknown_variables
    from server.http.serving import end_process, listen, run

    for sentence in unknown_variables(os.environ):
        log.warning(sentence)
    for file, names in registered.items():
        log.info("plug-in %s: %s", file, ", ".join(names))

    with _refusals():
        listeners = listen(settings.host, settings.port)
    end_process(run(settings, listeners))


@app.command(cls=PlainCommand)
def generate(
    prompt: Annotated[str, typer.Argument(help="What the image should show.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Output file: .png, .jpg or .webp.")
    ] = Path("out.png"),
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Overwrite the output file if it exists.")
    ] = False,
    negative_prompt: Annotated[
        str | None,
        typer.Option("--negative-prompt", "--negative", help="What guidance steers away from."),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=f"Sampler: {Described}")] = None,
    spacing: Annotated[str | None, typer.Option(help=f"Spacing: {Described}")] = None,
    guidance: Annotated[str | None, typer.Option(help=f"Guidance: {Described}")] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="Guidance scale, of --guidance or of the server's default rule."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"Guidance policy, of --guidance or of the server's default rule: {Described}"
        ),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help=f"Step cache, which skips evaluations: {Described}")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of sampling steps.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first image; random by default.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", help="Number of images; image i has seed + i.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="Image to start from (image to image, inpainting).")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Inpainting mask: white is repainted, black is kept.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Image to move away from, for guidance.negtome.")
    ] = None,
    reference_image: Annotated[
        list[Path] | None,
        typer.Option(
            help="Picture that the prompt refers to, for models that edit; repeat it for several."
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Fraction of the steps to run on --image, above 0 and up to 1."),
    ] = None,
    resize_mode: Annotated[
        str | None,
        typer.Option(help="How to fit an --image of other proportions: stretch, crop or fill."),
    ] = None,
    mask_content: Annotated[
        str | None,
        typer.Option(
            help="What the repainted part starts from: original, fill, latent_noise or "
            "latent_nothing."
        ),
    ] = None,
    hires: Annotated[
        str | None,
        typer.Option(
            help="Draw each image again at a larger size: the factor, or a JSON object with the "
            "fields of `hires`."
        ),
    ] = None,
    clip_skip: Annotated[
        int | None,
        typer.Option(
            help="Layer of the CLIP text encoders to read, counted from the last, which is 1."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="LoRA to draw with: its name, or NAME=WEIGHT; repeat it for several."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help=f"ControlNet and the picture that it reads, as {Pictured}; repeat it for several."
        ),
    ] = None,
    image_prompt: Annotated[
        list[str] | None,
        typer.Option(
            help=f"IP-Adapter and a picture to resemble, as {Pictured}; repeat it for several."
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other field of POST /v1/generate, as FIELD=VALUE; a value may be JSON. "
            "Repeat it for several.",
        ),
    ] = None,
    model: Models = None,
    vae: Vaes = None,
    tiny_vae: TinyVaes = None,
    denoiser: Denoisers = None,
    adapters: Adapters = None,
    embeddings: Embeddings = None,
    controls: Controls = None,
    image_prompts: ImagePrompts = None,
    device: Device = None,
    dtype: Dtype = None,
    deterministic: Deterministic = None,
    plugin: Plugins = None,
) -> None:
    """Generate images in this process, without a server."""
    _register(plugin)
    from server.output_files import OutputFiles
    from server.request_options import (
        adapter_of,
        base64_of,
        fields_set,
        guidance_of,
        hires_of,
        named,
        pictured,
        request_of,
    )

    settings = _settings(
        models=model,
        vaes=vae,
        tiny_vaes=tiny_vae,
        denoisers=denoiser,
        adapters=adapters,
        embeddings=embeddings,
        controls=controls,
        image_prompts=image_prompts,
        device=device,
        dtype=dtype,
        deterministic=deterministic,
    )
    with _refusals():
        files = OutputFiles(output, force=force)
        fields = {
            "prompt": prompt,
            "output_format": files.output_format,
            "negative_prompt": negative_prompt,
            "sampler": named(sampler),
            "spacing": named(spacing),
            "guidance": guidance_of(sampler, guidance, scale, policy),
            "cache": named(cache),
            "steps": steps,
            "seed": seed,
            "n": n,
            "width": width,
            "height": height,
            "image": base64_of(image),
            "mask": base64_of(mask),
            "reference": base64_of(reference),
            "reference_images": [base64_of(one) for one in reference_image or ()] or None,
            "strength": strength,
            "resize_mode": resize_mode,
            "mask_content": mask_content,
            "hires": hires_of(hires),
            "clip_skip": clip_skip,
            "adapters": [adapter_of(one) for one in adapter or ()] or None,
            "controls": [pictured("--control", one) for one in control or ()] or None,
            "image_prompts": [pictured("--image-prompt", one) for one in image_prompt or ()]
            or None,
        }
        request = request_of(**fields_set(more or (), fields))
        files.check(request.seed, request.n)
        made = _with_bar(settings, request)
        for note in made.notes:
            console.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)
        for warning in made.warnings:
            console.print(warning, style="yellow", highlight=False, markup=False, soft_wrap=True)
        for path in files.write([(one.seed, one.data) for one in made.pictures]):
            typer.echo(path)


@app.command(cls=PlainCommand)
def catalog(
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON, with the schema of every parameter.")
    ] = False,
    plugin: Plugins = None,
) -> None:
    """List the samplers, spacings, guidance rules, policies and other parts of guidance."""
    _register(plugin)
    from server.requests.catalog import catalog as installed

    listed = installed()
    if as_json:
        typer.echo(listed.model_dump_json(indent=2, exclude={"models"}))
        return
    out = Console()
    for choice in listed.choices:
        out.print(_table(choice.entries, getattr(listed, choice.entries)))
    out.print(f"upscalers of hires: {', '.join(listed.upscalers)}")
    out.print(f"mask_contents: {', '.join(listed.mask_contents)}")


@app.command(cls=PlainCommand)
def ems(
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Model folder. Default: embedded.")
    ] = None,
    guidance: Annotated[
        str, typer.Option(help="Guidance the statistics are for: cfg or none.")
    ] = "cfg",
    scale: Annotated[
        list[float] | None,
        typer.Option(
            help="Guidance scale; repeat the option for several, which cost little more than one."
        ),
    ] = None,
    points: Annotated[
        int, typer.Option(min=3, help="Number of noise levels, evenly spaced in log SNR.")
    ] = 120,
    samples: Annotated[
        int, typer.Option(min=2, help="Number of noised images at each level.")
    ] = 256,
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of images, each with its caption in a .txt file of the same name. "
            "Default: the model generates its own.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text file with one prompt per line, for images that the model generates.",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Sampling steps for images that the model generates.")
    ] = 25,
    chunk: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 8,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the noise and of the probe vectors.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Output file. Default: MODEL/weft/ems-GUIDANCE-SCALE.safetensors."),
    ] = None,
    device: Device = None,
) -> None:
    """Compute the model statistics that the sampler dpm_solver_v3 uses.

    An interrupted run resumes when the same command is given again.
    """
    # Loading a model imports the registries.
    _register(None)
    scales = _scales(guidance, scale)
    from server.fitting.model_statistics import Order, Size, run_order
    from server.models.folder import embedded_folders

    order = Order(
        folder=model or embedded_folders()["embedded"],
        scales=scales,
        size=Size(points, samples, chunk, seed),
        device=device or "auto",
        data=data,
        prompts=prompts,
        steps=steps,
        out=out,
    )
    for path in _with_stages(lambda on_progress: run_order(order, on_progress)):
        typer.echo(path)


@app.command(cls=PlainCommand)
def linear_ag(
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Model folder. Default: embedded.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=f"Sampler: {Described}")] = None,
    spacing: Annotated[str | None, typer.Option(help=f"Spacing: {Described}")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of sampling steps.")] = None,
    guidance: Annotated[str | None, typer.Option(help=f"Guidance rule: {Described}")] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="Guidance scale, of --guidance or of the server's default rule."),
    ] = None,
    every: Annotated[
        int,
        typer.Option(min=2, help="Steps from one evaluation of the second prediction to the next."),
    ] = 2,
    runs: Annotated[int, typer.Option(min=1, help="Number of fully guided runs to fit to.")] = 128,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Text file with one prompt per line, for these runs."
        ),
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Runs in one batch.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first run.")] = 1_000_000,
    device: Device = None,
    plugin: Plugins = None,
) -> None:
    """Fit the linear_adaptive policy to a model, sampler, spacing, step count and guidance rule."""
    _register(plugin)
    from server.fitting.linear_guidance import FitOrder, Runs, run_order
    from server.models.folder import embedded_folders
    from server.request_options import guidance_of, named, request_of

    policy = json.dumps({"name": "linear_adaptive", "every": every})
    with _refusals():
        request = request_of(
            prompt="",
            sampler=named(sampler),
            spacing=named(spacing),
            steps=steps,
            guidance=guidance_of(sampler, guidance, scale, policy),
        )
    folder = model or embedded_folders()["embedded"]
    order = FitOrder(folder, request, Runs(runs, chunk, seed), device or "auto", prompts)
    typer.echo(_with_stages(lambda on_progress: run_order(order, on_progress)))


def _register(plugins: Sequence[Path] | None) -> dict[Path, list[str]]:
    """Add the operator's files to the registries; before anything imports these."""
    from server.plugin_files import register
    from weft_plugins import PluginError

    try:
        return register(plugins or ())
    except PluginError as error:
        _refuse(str(error))


def _scales(guidance: str, scales: list[float] | None) -> list[float]:
    if guidance not in ("cfg", "none"):
        _refuse(f"guidance is {guidance!r}; statistics can be computed for 'cfg' or 'none'.")
    if guidance == "none" and scales:
        _refuse("scale has no effect with guidance 'none'; leave it out.")
    if guidance == "cfg" and not scales:
        _refuse("scale is missing; guidance 'cfg' needs one, for example --scale 4.")
    return list(dict.fromkeys(scales or [1.0]))


def _table(title: str, entries: Sequence[Entry]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, expand=True)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("description", ratio=3)
    table.add_column("parameters and defaults", ratio=2, style="dim")
    for entry in entries:
        parameters = {key: value for key, value in entry.defaults.items() if key != "name"}
        shown = ", ".join(f"{key} {json.dumps(value)}" for key, value in parameters.items())
        origin = "" if entry.plugin is None else f" (from {entry.plugin})"
        table.add_row(entry.name, f"{entry.summary}{origin}", shown)
    return table


def _settings(**given: Any) -> Settings:
    """Return the settings from the environment and the options; options not given are None."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from server.settings import Settings

    try:
        return Settings(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        from server.environment import refusal

        _refuse(refusal(error))
    except (SettingsError, RecursionError):
        # RecursionError is Python's error for JSON that is nested too deeply.
        from server.environment import groups_without_json

        _refuse(next(groups_without_json(os.environ)))


def _bars() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _with_stages(work: Callable[[ProgressCallback], Result]) -> Result:
    with _refusals(), _bars() as bar:
        bars = {"": bar.add_task("loading the model", total=None)}

        def on_progress(stage: str, done: int, total: int) -> None:
            bar.update(bars[""], visible=False)
            if stage not in bars:
                bars[stage] = bar.add_task(stage, total=total)
            bar.update(bars[stage], completed=done)

        return work(on_progress)


def _with_bar(settings: Settings, request: GenerateRequest) -> Pictures:
    with _bars() as bar:
        loading = bar.add_task("starting", total=None)
        from server.heap import gc_frozen

        with gc_frozen():
            from server.service.one_shot import generate as make

        def on_loading(stage: str, done: int, total: int) -> None:
            bar.update(loading, description=stage, completed=done, total=total or None)

        def on_progress(progress: Any) -> None:
            bar.update(loading, visible=False)
            while len(bar.tasks) < request.n + 1:
                bar.add_task(f"image {len(bar.tasks)}", total=progress.steps)
            bar.update(bar.tasks[progress.index + 1].id, completed=progress.step)

        return asyncio.run(make(settings, request, on_progress, on_loading))


@contextmanager
def _refusals() -> Generator[None]:
    """Print the message of a refusal within the `with` block, and end the process."""
    from server.errors import WeftError

    try:
        yield
    except WeftError as error:
        _refuse(error.message)


def _refuse(sentence: str) -> NoReturn:
    console.print(sentence, style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(2)

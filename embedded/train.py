"""Train the embedded model from scratch: `python -m embedded.train`.

Each stage can be run by itself: the autoencoder, the U-Net with the text encoder, and the report. A
training stage ends after `--steps` or `--minutes`, whichever comes first. The stage `weak` trains
the small companion that autoguidance steers away from, and the stage `decoder` trains only the
decoder, on latents from the finished U-Net.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from embedded import MODEL_FOLDER, STUDENT_FOLDER
from embedded.autoencoder_training import AutoencoderSettings, train_autoencoder
from embedded.checkpoint import metadata_of
from embedded.components import (
    WEAK_WIDTHS,
    Components,
    load_components,
    make_components,
    make_unet,
    save_autoencoder,
    save_model,
    save_weak,
)
from embedded.decoder_training import DecoderSettings, train_decoder
from embedded.report import (
    Sampling,
    contact_sheet,
    load_pipeline,
    score_autoencoder,
    score_model,
    table,
    unseen_scenes,
)
from embedded.scenes import make_scene
from embedded.unet_training import UNetSettings, train_unet, training_captions

_GATE = 0.99
_REPORT = Path(__file__).parent / "REPORT.md"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="embedded.train", description=__doc__)
    parser.add_argument(
        "stage",
        nargs="?",
        choices=["all", "autoencoder", "unet", "weak", "decoder", "report"],
        default="all",
    )
    parser.add_argument("--minutes", type=float, help="end a training stage after so many minutes")
    parser.add_argument("--steps", type=int, help="end a training stage after so many steps")
    parser.add_argument("--batch", type=int, default=32, help="images (or crops) per step")
    parser.add_argument(
        "--pictures", type=int, default=20_000, help="training images for the U-Net"
    )
    parser.add_argument("--captions", type=int, default=400, help="unseen captions in the report")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint")
    parser.add_argument(
        "--publish-minutes", type=float, default=20.0, help="minutes between previews"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/embedded"), help="folder for checkpoints"
    )
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="model folder to write")
    parser.add_argument(
        "--student", type=Path, default=STUDENT_FOLDER, help="folder that gets the decoder too"
    )
    parser.add_argument("--notes", type=Path, help="text file appended to the report")
    return parser.parse_args()


def main() -> int:
    """Run the requested stages; the exit status is 1 if the autoencoder fails its gate."""
    options = _arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.steps is None and options.minutes is None:
        options.steps = 20_000
    if options.stage in ("all", "autoencoder") and not run_autoencoder(options):
        return 1
    if options.stage in ("all", "unet"):
        run_unet(options)
    if options.stage == "weak":
        run_weak(options)
    if options.stage == "decoder" and not run_decoder(options):
        return 1
    if options.stage in ("all", "report"):
        run_report(options)
    return 0


def run_autoencoder(options: argparse.Namespace) -> bool:
    """Train the autoencoder; returns whether its reconstructions pass the gate."""
    checkpoint = options.out / "autoencoder.safetensors"
    if not options.resume:
        checkpoint.unlink(missing_ok=True)
    settings = AutoencoderSettings(
        steps=options.steps,
        minutes=options.minutes,
        batch=options.batch,
        pictures=1024,
        device=options.device,
        seed=options.seed,
    )
    autoencoder = train_autoencoder(settings, checkpoint)
    autoencoder.save_pretrained(options.out / "autoencoder")
    return _passes(autoencoder, options.device)


def _passes(autoencoder: AutoencoderTiny, device: str) -> bool:
    scenes = [make_scene(4_000_000_000 + number) for number in range(400)]
    score = score_autoencoder(autoencoder.eval(), scenes, device)
    print(table({"reconstructions": score}))
    passed = score.share() >= _GATE
    print(f"gate of {_GATE:.0%} {'passed' if passed else 'failed'}")
    return passed


def run_unet(options: argparse.Namespace) -> None:
    """Train the U-Net and the text encoder, writing previews to the model folder."""
    if not options.resume:
        (options.out / "unet.safetensors").unlink(missing_ok=True)
        (options.out / "corpus.safetensors").unlink(missing_ok=True)
    torch.manual_seed(options.seed)
    components = make_components()
    components.autoencoder = AutoencoderTiny.from_pretrained(options.out / "autoencoder")
    known = _known_captions(options.pictures)

    def publish(components: Components, step: int) -> None:
        save_model(components, options.model)
        print(f"published step {step}\n{_glance(options, known)}", flush=True)

    train_unet(components, _unet_settings(options), options.out, publish)


def run_weak(options: argparse.Namespace) -> None:
    """Train a narrower U-Net on the model's own autoencoder and text encoder, which stay fixed."""
    if not options.resume:
        (options.out / "weak" / "unet.safetensors").unlink(missing_ok=True)
    torch.manual_seed(options.seed)
    components = load_components(options.model)
    components.text_encoder.requires_grad_(requires_grad=False)
    components.unet = make_unet(WEAK_WIDTHS)

    def publish(components: Components, step: int) -> None:
        save_weak(components.unet, options.model)
        print(f"published step {step} of the companion", flush=True)

    train_unet(components, _unet_settings(options), options.out / "weak", publish)


def run_decoder(options: argparse.Namespace) -> bool:
    """Train the decoder on the model's own latents; returns whether it passes the gate."""
    checkpoint = options.out / "decoder.safetensors"
    if not options.resume:
        checkpoint.unlink(missing_ok=True)
    components = load_components(options.model)
    settings = DecoderSettings(
        steps=options.steps,
        minutes=options.minutes,
        batch=options.batch,
        rate=1e-3,
        pictures=options.pictures,
        device=options.device,
        seed=options.seed,
    )
    components.autoencoder = train_decoder(components, settings, checkpoint)
    if not _passes(components.autoencoder, options.device):
        return False
    for folder in (options.model, options.student):
        save_autoencoder(components.autoencoder, folder)
    return True


def _unet_settings(options: argparse.Namespace) -> UNetSettings:
    return UNetSettings(
        steps=options.steps,
        minutes=options.minutes,
        batch=options.batch,
        pictures=options.pictures,
        device=options.device,
        seed=options.seed,
        publish_minutes=options.publish_minutes,
    )


def _known_captions(pictures: int) -> frozenset[str]:
    return frozenset(text for texts in training_captions(pictures) for text in texts)


def _glance(options: argparse.Namespace, known: frozenset[str]) -> str:
    """A short report on the published model."""
    pipeline = load_pipeline(options.model, options.device)
    names = {"one object": 1, "two objects": 2}
    return table(
        {
            name: score_model(pipeline, unseen_scenes(things, 40, known), Sampling())[0]
            for name, things in names.items()
        }
    )


def run_report(options: argparse.Namespace) -> None:
    """Measure the stored model on unseen captions; writes REPORT.md and a contact sheet."""
    known = _known_captions(options.pictures)
    pipeline = load_pipeline(options.model, options.device)
    sampling = Sampling(seed=options.seed)
    started = time.monotonic()
    one, one_pictures = score_model(
        pipeline, unseen_scenes(1, options.captions // 2, known), sampling
    )
    two, two_pictures = score_model(
        pipeline, unseen_scenes(2, options.captions // 2, known), sampling
    )
    reconstructions = score_autoencoder(
        pipeline.vae, [make_scene(4_000_000_000 + n) for n in range(400)], options.device
    )
    minutes = (time.monotonic() - started) / 60
    scores = {"one object": one, "two objects": two, "reconstructions": reconstructions}
    print(table(scores))
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = np.concatenate([one_pictures[:24], two_pictures[:24]])
    Image.fromarray(contact_sheet(chosen, columns=8)).save(options.out / "contact_sheet.png")
    _REPORT.write_text(
        f"""# Report on the embedded model

{options.captions} captions that are not among the training captions, drawn by diffusers' own
`StableDiffusionPipeline` (DDIM, trailing spacing, {sampling.steps} steps, guidance scale
{sampling.scale:g}, one noise seed a picture from {sampling.seed} on) and read by
`embedded/checker.py`. A picture is right if every attribute that its caption mentions is. The last
row asks the checker about the autoencoder's reconstructions of 400 pictures, all attributes.

{table(scores)}

Written by `{_command()}` in {minutes:.1f} minutes on {options.device}.

## Training

{_history(options)}
"""
    )
    print(f"wrote {_REPORT}")


def _command() -> str:
    return " ".join(["python -m embedded.train", *sys.argv[1:]])


def _history(options: argparse.Namespace) -> str:
    """Steps and minutes of each stage, read from its checkpoint."""
    lines = ["| stage | steps | minutes |", "|---|---|---|"]
    for stage in ("autoencoder", "unet"):
        file = options.out / f"{stage}.safetensors"
        if file.exists():
            reached = metadata_of(file)
            minutes = float(reached["spent_s"]) / 60
            lines.append(f"| {stage} | {reached['step']} | {minutes:.0f} |")
    notes = ["", options.notes.read_text().strip()] if options.notes else []
    return "\n".join(lines + notes)


if __name__ == "__main__":
    sys.exit(main())

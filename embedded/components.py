"""The parts of the embedded model, untrained or loaded, and the folder that stores them."""

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import diffusers
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, LCMScheduler, UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn
from transformers import AddedToken, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from embedded.scenes import VOCABULARY, make_scene

MAX_TOKENS: Final = 32
LATENT_CHANNELS: Final = 4
LATENT_SIZE: Final = 16
"""Height and width of a picture's latents; a latent cell is 8 pixels wide."""
WIDTHS: Final = (64, 96, 128)
"""Channels of the U-Net's levels."""
WEAK_WIDTHS: Final = (32, 48, 64)
"""Channels of the levels of the weaker companion, which autoguidance steers away from."""

_TEXT_WIDTH: Final = 128
_PROMPTS: Final = 1024
"""Number of captions stored with the model, for what is fitted to it."""
_FIRST_PROMPT: Final = 5_000_000_000
_START, _END, _UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"


@dataclass(slots=True)
class Components:
    """The trainable parts."""

    autoencoder: AutoencoderTiny
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel


def make_tokenizer() -> CLIPTokenizer:
    """A tokenizer with one token per word; unknown words become one unknown token per character."""
    tokenizer = CLIPTokenizer(
        vocab={_START: 0, _END: 1, _UNKNOWN: 2},
        merges=[],
        unk_token=_UNKNOWN,
        model_max_length=MAX_TOKENS,
    )
    # Byte-pair encoding would need a token for every piece of a word; added tokens do not.
    tokenizer.add_tokens(
        [AddedToken(word, single_word=word.isalpha(), normalized=True) for word in VOCABULARY]
    )
    return tokenizer


def make_text_encoder() -> CLIPTextModel:
    """The text encoder, untrained."""
    tokenizer = make_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="gelu",
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def make_unet(
    widths: tuple[int, int, int] = WIDTHS, *, scale_features: int | None = None
) -> UNet2DConditionModel:
    """A U-Net, untrained, with cross-attention at the two lower of three levels of these widths.

    With `scale_features` it is conditioned on the guidance scale by an embedding of this size.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_TEXT_WIDTH,
        # In this class the name means the number of heads.
        attention_head_dim=4,
        norm_num_groups=16,
        time_cond_proj_dim=scale_features,
    )


def make_autoencoder(decoder_blocks: tuple[int, ...] = (3, 3, 1, 1)) -> AutoencoderTiny:
    """The autoencoder, untrained; it has few layers at full resolution, where they cost most.

    Args:
        decoder_blocks: numbers of residual blocks of the decoder at 16, 32, 64 and 128 pixels.
    """
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(0, 1, 2, 2),
        num_decoder_blocks=decoder_blocks,
        latent_channels=LATENT_CHANNELS,
    )
    _initialize(autoencoder)
    return autoencoder


@torch.no_grad()
def _initialize(autoencoder: AutoencoderTiny) -> None:
    """Initialize so that layers preserve the signal's variance and residual blocks are identities.

    There is no normalization to compensate for the shrinking signal of the default initialisation.
    """
    for module in autoencoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in autoencoder.modules():
        if isinstance(module, AutoencoderTinyBlock):
            cast("nn.Conv2d", module.conv[-1]).weight.mul_(0.1)


def make_scheduler() -> DDIMScheduler:
    """DDIM for v-prediction on linear betas; the last alpha squared is 4e-5: black stays black."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def make_few_step_scheduler() -> LCMScheduler:
    """The scheduler of the models distilled from the embedded model."""
    shared = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    config = make_scheduler().config
    return LCMScheduler(
        **{entry: config[entry] for entry in shared},
        original_inference_steps=50,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def make_components() -> Components:
    """All trainable parts, untrained."""
    return Components(make_autoencoder(), make_unet(), make_text_encoder())


def load_components(folder: Path) -> Components:
    """All trained parts, loaded from a model folder."""
    return Components(
        AutoencoderTiny.from_pretrained(folder / "vae"),
        UNet2DConditionModel.from_pretrained(folder / "unet"),
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
    )


def save_model(components: Components, folder: Path) -> None:
    """Write a complete diffusers folder; each file is replaced atomically.

    The U-Net and the autoencoder are stored in float16, which diffusers loads as float32. The text
    encoder stays in float32, as transformers would load float16 as float16.
    """

    def write(fresh: Path) -> None:
        _write(components, fresh, "StableDiffusionPipeline", make_scheduler())
        captions = [make_scene(_FIRST_PROMPT + number).caption for number in range(_PROMPTS)]
        (fresh / "weft").mkdir()
        (fresh / "weft" / "prompts.txt").write_text("\n".join(captions) + "\n")

    _replace(folder, write)


def save_student(components: Components, folder: Path, scale: float) -> None:
    """Write the folder of a latent consistency model with its default scale, in the same way."""

    def write(fresh: Path) -> None:
        scheduler = make_few_step_scheduler()
        _write(components, fresh, "LatentConsistencyModelPipeline", scheduler)
        (fresh / "weft").mkdir()
        stated = {"convention": "lcm", "scale": scale}
        (fresh / "weft" / "defaults.json").write_text(json.dumps(stated) + "\n")

    _replace(folder, write)


def _replace(folder: Path, write: Callable[[Path], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as name:
        fresh = Path(name)
        write(fresh)
        for source in sorted(fresh.rglob("*")):
            if source.is_file():
                target = folder / source.relative_to(fresh)
                target.parent.mkdir(parents=True, exist_ok=True)
                source.replace(target)


def save_weak(unet: UNet2DConditionModel, folder: Path) -> None:
    """Store the weaker companion in a model folder, where the server looks for it."""
    _write_part(unet, folder / "weft" / "weak")


def save_autoencoder(autoencoder: AutoencoderTiny, folder: Path) -> None:
    """Store only the autoencoder in a model folder, in the same way."""
    _replace(folder, lambda fresh: _write_part(autoencoder, fresh / "vae"))


def _write(
    components: Components, folder: Path, pipeline: str, scheduler: DDIMScheduler | LCMScheduler
) -> None:
    components.text_encoder.save_pretrained(folder / "text_encoder")
    _write_part(components.autoencoder, folder / "vae")
    _write_part(components.unet, folder / "unet")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_part(part: AutoencoderTiny | UNet2DConditionModel, place: Path) -> None:
    copy.deepcopy(part).half().save_pretrained(place)
    _leave_out(place / "config.json", "_name_or_path")
    if isinstance(part, AutoencoderTiny):
        # diffusers derives this entry itself and warns when it reads it.
        _leave_out(place / "config.json", "block_out_channels")


def _leave_out(config: Path, entry: str) -> None:
    entries = {k: v for k, v in json.loads(config.read_text()).items() if k != entry}
    config.write_text(json.dumps(entries, indent=2) + "\n")

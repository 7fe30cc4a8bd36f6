"""A tiny Qwen-Image with random weights, as diffusers makes and saves it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.server.models.tiny_qwen import VOCABULARY, byte_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    # Far from the default, so that no hidden state is nearly that of another layer.
    "initializer_range": 0.5,
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [0],
}
SCHEDULER: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
CHANNELS = 4


PICTURE_TOKENS = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"


def make(kind: Any = QwenImagePipeline, **transformer_config: Any) -> Any:
    """The pipeline.

    Args:
        kind: its class; those for edits also have a processor.
        transformer_config: further entries of the transformer's config.
    """
    torch.manual_seed(0)
    edits = kind is not QwenImagePipeline
    transformer: Any = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        **transformer_config,
    )
    # As initialized, so little of a text gets through that it would not show in a picture.
    for block in transformer.transformer_blocks:
        for layer in (block.img_mod[1], block.txt_mod[1], block.attn.to_out[0]):
            torch.nn.init.normal_(layer.weight, std=0.5)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)
    vae = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[1.5, 2.0, 2.5, 3.0],
    )
    tokenizer = byte_tokenizer(PICTURE_TOKENS if edits else ())
    text = {**TEXT, "vocab_size": len(tokenizer)}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=VISION)
    if edits:
        config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    processor = {"processor": Reader(tokenizer)} if edits else {}
    pipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        **processor,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Reader:
    """Does what Qwen2VLProcessor does; transformers' own needs torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self.image_processor = Qwen2VLImageProcessorPil()
        self._tokenizer = tokenizer

    def __call__(self, text: list[str], images: Any, **settings: Any) -> Any:
        if not isinstance(images, list):
            images = [images]
        made = self.image_processor(images, return_tensors="pt")
        expanded: list[str] = []
        for one in text:
            before, *after = one.split("<|image_pad|>")
            for grid, rest in zip(made["image_grid_thw"], after, strict=True):
                before += "<|image_pad|>" * (int(grid.prod()) // 4) + rest
            expanded.append(before)
        return BatchFeature({**self._tokenizer(expanded, **settings), **made})

"""Parts are built with everything that their weight files do not hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from server.models.parts import check_loaded, load_network, load_text_encoder

TINY = Qwen3Config(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parts = {
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "text_encoder": ["transformers", "Qwen3Model"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    return tmp_path


def test_tables_of_positions_are_computed_while_a_network_is_built(folder: Path) -> None:
    theirs = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        norm_num_groups=2,
    )
    theirs.save_pretrained(folder / "transformer")
    assert "pos_embed.pos_embed" not in theirs.state_dict()
    ours = load_network(folder, "transformer", [PixArtTransformer2DModel], torch.float32)
    check_loaded(folder, {"transformer": ours})
    torch.testing.assert_close(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed)


def test_a_config_from_before_transformers_5_keeps_its_rotary_base(folder: Path) -> None:
    Qwen3Model(TINY).save_pretrained(folder / "text_encoder")
    file = folder / "text_encoder/config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    file.write_text(json.dumps(config | {"rope_theta": 400.0, "rope_scaling": None}))
    ours = load_text_encoder(folder, "text_encoder", Qwen3Model, torch.float32)
    assert ours.rotary_emb.inv_freq.tolist() == pytest.approx([1, 1 / 20])

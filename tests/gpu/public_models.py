"""The networks of all `conf/model` files at real shapes, on the meta device: names and shapes without memory.

The numbers are from the `config.json` of each model on the Hugging Face hub. `WEIGHTS` are the parameter counts that
the model pages state, to catch a number copied wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)


def _qwen2_text(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
    }


def _mrope(text: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return {**text, "rope_parameters": rope, "tie_word_embeddings": tied}


def _qwen2_vl(text: dict[str, Any], *, tied: bool) -> Qwen2VLConfig:
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": text["hidden_size"]}
    return Qwen2VLConfig(text_config=_mrope(text, tied=tied), vision_config=vision, tie_word_embeddings=tied)


def _qwen2_5_vl(text: dict[str, Any], *, tied: bool) -> Qwen2_5_VLConfig:
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Qwen2_5_VLConfig(text_config=_mrope(text, tied=tied), vision_config=vision, tie_word_embeddings=tied)


def _qwen3_vl(width: int, inner: int, layers: int, heads: int) -> Qwen3VLConfig:
    text = {
        **_qwen2_text(width, inner, layers, heads, 8, 151_936),
        "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": width,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


def _internvl(text: dict[str, Any]) -> InternVLConfig:
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
        "attention_bias": True,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6}
    base = {"model_type": "qwen2", "tie_word_embeddings": False, "rope_parameters": rope}
    return InternVLConfig(text_config={**base, **text}, vision_config=vision, tie_word_embeddings=False)


PUBLIC: dict[str, PreTrainedConfig] = {
    "qwen2_vl_2b": _qwen2_vl(_qwen2_text(1536, 8960, 28, 12, 2, 151_936), tied=True),
    "qwen2_vl_7b": _qwen2_vl(_qwen2_text(3584, 18944, 28, 28, 4, 152_064), tied=False),
    "qwen2_5_vl_3b": _qwen2_5_vl(_qwen2_text(2048, 11008, 36, 16, 2, 151_936), tied=True),
    "qwen2_5_vl_7b": _qwen2_5_vl(_qwen2_text(3584, 18944, 28, 28, 4, 152_064), tied=False),
    "qwen3_vl_2b": _qwen3_vl(2048, 6144, 28, 16),
    "qwen3_vl_4b": _qwen3_vl(2560, 9728, 36, 32),
    "internvl3_1b": _internvl(_qwen2_text(896, 4864, 24, 14, 2, 151_674)),
    "internvl3_8b": _internvl(_qwen2_text(3584, 18944, 28, 28, 4, 151_674)),
}

WEIGHTS = {
    "qwen2_vl_2b": 2.209e9,
    "qwen2_vl_7b": 8.291e9,
    "qwen2_5_vl_3b": 3.755e9,
    "qwen2_5_vl_7b": 8.292e9,
    "qwen3_vl_2b": 2.127e9,
    "qwen3_vl_4b": 4.438e9,
    "internvl3_1b": 0.938e9,
    "internvl3_8b": 7.944e9,
}


def public_network(name: str) -> nn.Module:
    """Return the network in bfloat16, of the class that the learner trains."""
    with torch.device("meta"):
        network: nn.Module = AutoModelForImageTextToText.from_config(PUBLIC[name], dtype=torch.bfloat16)
    return network

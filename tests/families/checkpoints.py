"""A small random checkpoint of each family, with every feature that distinguishes it from the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from othink_ray.families.tiny import CHAT_TEMPLATE, train_tokenizer

VOCABULARY = 384  # larger than the tokenizer, as in real checkpoints
WIDTH = 128


def _qwen2_vl(tokenizer: PreTrainedTokenizerFast) -> tuple[Any, ProcessorMixin]:
    """Tied embeddings, like the 2B model."""
    vision = {"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": WIDTH, "mlp_ratio": 4}
    config = Qwen2VLConfig(
        text_config=_text(tokenizer, mrope_section=[4, 6, 6]),
        vision_config=vision,
        tie_word_embeddings=True,
        **_special(tokenizer),
    )
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    return Qwen2VLForConditionalGeneration(config), processor


def _qwen2_5_vl(tokenizer: PreTrainedTokenizerFast) -> tuple[Any, ProcessorMixin]:
    """Untied embeddings, like the 7B model; windows of 2 x 2 image tokens in all vision layers but the second."""
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=_text(tokenizer, mrope_section=[4, 6, 6]), vision_config=vision, **_special(tokenizer)
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl(tokenizer: PreTrainedTokenizerFast) -> tuple[Any, ProcessorMixin]:
    """Tied embeddings, like the 2B and 4B models; two DeepStack layers; a grid of 6 x 6 learned positions."""
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    }
    text = _text(tokenizer, mrope_section=[6, 5, 5], mrope_interleaved=True) | {"head_dim": 32}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_special(tokenizer))
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    return Qwen3VLForConditionalGeneration(config), processor


def _internvl(tokenizer: PreTrainedTokenizerFast) -> tuple[Any, ProcessorMixin]:
    """Tiles of 4 x 4 patches, four patches per token; dynamic NTK text positions, like the real models."""
    special_tokens = {
        "start_image_token": "<img>",
        "context_image_token": "<IMG_CONTEXT>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    }
    with_image_tokens = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=special_tokens,
    )
    tile = {"height": 56, "width": 56}
    vision = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "attention_bias": True,
        "image_size": 56,
    }
    text = _text(with_image_tokens, rope_type="dynamic", factor=2.0) | {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
    }
    config = InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=with_image_tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=True,
        dtype="float32",
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=tile),
        tokenizer=with_image_tokens,
        video_processor=InternVLVideoProcessor(size=tile),
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", '<IMG_CONTEXT>{{ "\\n" }}'),
    )
    return InternVLForConditionalGeneration(config), processor


CHECKPOINTS: dict[str, Callable[[PreTrainedTokenizerFast], tuple[Any, ProcessorMixin]]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
}


def build_checkpoint(family: str, folder: Path, texts: Iterable[str]) -> None:
    """Write a random checkpoint of the family as a Hugging Face folder."""
    tokenizer = train_tokenizer(texts)
    network, processor = CHECKPOINTS[family](tokenizer)
    randomize(network)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)


def randomize(network: nn.Module) -> None:
    """Set all weights to values that matter (none zero or one), so that a missing weight changes the logprobs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (0.3 if "embed_tokens" in name else parameter[0].numel() ** -0.5))
            else:
                parameter.copy_(noise * 0.3 + (0.0 if name.endswith("bias") else 1.0))


def _text(tokenizer: PreTrainedTokenizerFast, **rope: Any) -> dict[str, Any]:
    token_id = tokenizer.convert_tokens_to_ids
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **rope},
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }


def _special(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    token_id = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "dtype": "float32",
    }

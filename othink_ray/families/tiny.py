"""The built-in model: a Qwen2-VL of about a million parameters with a tokenizer trained locally; no download."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from othink_ray.config.schema import ModelConfig, TinyConfig

_INIT_STD = 0.05  # at this width, 0.02 keeps SFT on a plateau for eight times as many steps

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The chat format of Qwen2-VL: one block per turn, images before text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}{{ "\\n" }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "image" -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>{{ "\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ "\\n" }}{%- endif -%}
"""


def build_tiny(folder: Path, model: ModelConfig, texts: Iterable[str]) -> None:
    """Write a randomly initialized model, its tokenizer (trained on `texts`) and processor as a Hugging Face folder."""
    assert model.tiny is not None
    tokenizer = train_tokenizer(texts)
    image_processor = Qwen2VLImageProcessor(min_pixels=model.min_pixels, max_pixels=model.max_pixels)
    processor = Qwen2VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    network = Qwen2VLForConditionalGeneration(_config(model.tiny, tokenizer))
    _initialize(network, model.tiny.seed)
    network.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    network.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    network.save_pretrained(folder)
    processor.save_pretrained(folder)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with one token per digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
    )


def _config(tiny: TinyConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    token_id = tokenizer.convert_tokens_to_ids
    half_head = tiny.head_dim // 2
    time = half_head // 4
    height = (half_head - time) // 2
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": tiny.text_width,
            "intermediate_size": 3 * tiny.text_width,
            "num_hidden_layers": tiny.text_layers,
            "num_attention_heads": tiny.text_width // tiny.head_dim,
            "num_key_value_heads": tiny.kv_heads,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [time, height, half_head - time - height],
            },
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            "depth": tiny.vision_layers,
            "embed_dim": tiny.vision_width,
            "num_heads": tiny.vision_width // 32,
            "hidden_size": tiny.text_width,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
        dtype="float32",
    )


def _initialize(network: torch.nn.Module, seed: int) -> None:
    """Initialize normal matrices, unit norms and zero biases in order of name, for the same bytes on any machine."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * _INIT_STD)

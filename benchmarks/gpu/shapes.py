"""Networks of the sizes of public models, with random weights and a small tokenizer; nothing is downloaded."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from othink_ray.config.schema import ModelConfig
from othink_ray.families.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, train_tokenizer
from othink_ray.types import Completion, Group, Message, Prompt, ScoredGroup

QUESTION = "How many items are there in the image?"
VOCABULARY = 151_936
MOST_PIXELS = 1036**2  # 37 x 37 cells: an image of 1024 x 1024 is not scaled down
_CONFIGS: dict[str, Any] = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig}
_PROCESSORS: dict[str, Any] = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a network within its family, for both towers, under the names of transformers."""

    family: str
    text: dict[str, Any]
    vision: dict[str, Any]

    def model(self, folder: Path, dtype: str) -> ModelConfig:
        return ModelConfig(
            name=folder.name,
            family=self.family,
            path=str(folder),
            dtype=dtype,
            min_pixels=3136,
            max_pixels=MOST_PIXELS,
            tiny=None,
            smol=None,
        )


SHAPES = {
    "qwen2_vl_2b": Shape(
        family="qwen2_vl",
        text={
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "mrope_section": [16, 24, 24],
        },
        vision={"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536, "mlp_ratio": 4},
    ),
    "qwen2_5_vl_3b": Shape(
        family="qwen2_5_vl",
        text={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "mrope_section": [16, 24, 24],
        },
        vision={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    ),
}


def write_model(shape: Shape, folder: Path, device: torch.device, dtype: str) -> ModelConfig:
    """Write a Hugging Face folder unless it exists, and return its config; parts of the check share it."""
    model = shape.model(folder, dtype)
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        tokenizer = train_tokenizer([QUESTION])
        torch.manual_seed(0)
        with device:
            network = AutoModelForImageTextToText.from_config(
                _config(shape, tokenizer, dtype), dtype=getattr(torch, dtype)
            )
        network.save_pretrained(unfinished)
        _PROCESSORS[shape.family](
            image_processor=Qwen2VLImageProcessor(min_pixels=model.min_pixels, max_pixels=model.max_pixels),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(),
            chat_template=CHAT_TEMPLATE,
        ).save_pretrained(unfinished)
        unfinished.rename(folder)
    return model


def _config(shape: Shape, tokenizer: PreTrainedTokenizerFast, dtype: str) -> Any:
    """Return the transformers config, with tied embeddings as in both public models."""
    token_id = tokenizer.convert_tokens_to_ids
    text = dict(shape.text)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope_section")}
    return _CONFIGS[shape.family](
        text_config={
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": rope,
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
            **text,
        },
        vision_config={"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, **shape.vision},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
        dtype=dtype,
    )


def questions(count: int, side: int) -> list[Prompt]:
    """Return prompts, each with a different image: `side` x `side` pixels of noise."""
    return [
        Prompt(
            id=f"check/{side}/{index}",
            messages=(Message(role="user", text=QUESTION, images=1),),
            images=(_noise(side, index),),
            answer="1",
            task="counting",
        )
        for index in range(count)
    ]


def _noise(side: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def random_answers(family: Any, prompts: list[Prompt], answers: int, tokens: int) -> list[ScoredGroup]:
    """Return groups of random tokens with random rewards, as a sampler would."""
    rng = np.random.default_rng(0)
    return [
        scored(
            Group(
                prompt=prompt,
                prompt_token_ids=np.array(
                    family.expand(family.prompt_token_ids(prompt), family.image_token_counts(prompt.images))
                ),
                completions=tuple(
                    Completion(
                        token_ids=rng.integers(len(SPECIAL_TOKENS), VOCABULARY, tokens),
                        sampler_logprobs=np.full(tokens, -np.log(VOCABULARY), dtype=np.float32),
                        text="",
                        finish="length",
                    )
                    for _ in range(answers)
                ),
                version=0,
            ),
            seed=index,
        )
        for index, prompt in enumerate(prompts)
    ]


def scored(group: Group, seed: int) -> ScoredGroup:
    """Return the group with random rewards: those of an untrained model are all equal and give no gradient."""
    answers = len(group.completions)
    rewards = np.random.default_rng(seed).random(answers)
    return ScoredGroup(group=group, rewards=rewards, parts={}, valid=np.ones(answers, dtype=bool))

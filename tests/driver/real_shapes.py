"""Model folders with the configurations, classes and sizes of public models, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from othink_ray.families.tiny import CHAT_TEMPLATE, train_tokenizer

VOCABULARY = 151_936
SIZES: dict[str, tuple[dict[str, int], bool]] = {
    "2b": ({"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}, True),
    "7b": (
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
        False,
    ),
}
TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16}


def write_shapes(folder: Path, text: dict[str, Any], tower: dict[str, Any], *, tied: bool, vocabulary: int) -> Path:
    """Write a Qwen2-VL without weights: configuration, processor and a small tokenizer."""
    tokenizer = train_tokenizer(["How many items are there in the image?"])
    token_id = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope_section", [16, 24, 24])}
    config = Qwen2VLConfig(
        text_config={"vocab_size": vocabulary, "tie_word_embeddings": tied, "rope_parameters": rope, **text},
        vision_config={
            "hidden_size": text["hidden_size"],
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **tower,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    config.save_pretrained(folder)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def write_public(folder: Path, name: str) -> Path:
    """Write Qwen2-VL-2B or -7B (`name`: 2b or 7b) without weights."""
    text, tied = SIZES[name]
    return write_shapes(folder, text | {"num_hidden_layers": 28}, dict(TOWER), tied=tied, vocabulary=VOCABULARY)

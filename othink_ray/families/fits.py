"""Whether a prompt has room in the model: only a tokenizer and an image processor can tell."""

from __future__ import annotations

from othink_ray.config.schema import RolloutConfig
from othink_ray.data.prompts import BadRow
from othink_ray.families.base import Family
from othink_ray.types import Prompt


def check_fits(family: Family, rollout: RolloutConfig, prompt: Prompt) -> None:
    """BadRow when the prompt, its images and an answer of full length are more than the engines take."""
    if len(prompt.images) > rollout.max_images:
        reason = f"it has {len(prompt.images)} images, more than rollout.max_images = {rollout.max_images}"
        raise BadRow(prompt.id, reason, "raise rollout.max_images or remove the row")
    text_tokens, image_tokens = lengths(family, prompt)
    needed = text_tokens + image_tokens + rollout.max_tokens
    if needed > rollout.max_model_len:
        reason = (
            f"{text_tokens} tokens of text, {image_tokens} of images and rollout.max_tokens = {rollout.max_tokens} "
            f"are {needed}, more than rollout.max_model_len = {rollout.max_model_len}"
        )
        raise BadRow(prompt.id, reason, "raise rollout.max_model_len, lower model.max_pixels or remove the row")


def lengths(family: Family, prompt: Prompt) -> tuple[int, int]:
    """How many tokens of text and of images the network sees; BadRow when the text has placeholders of its own."""
    token_ids = family.prompt_token_ids(prompt)
    places = token_ids.count(family.image_token_id)
    if places != len(prompt.images):
        reason = f"its text spells {places - len(prompt.images)} image placeholder(s) of the model out"
        raise BadRow(prompt.id, reason, "take them out of the question")
    counts = family.image_token_counts(prompt.images)
    return len(family.expand(token_ids, counts)) - sum(counts), sum(counts)

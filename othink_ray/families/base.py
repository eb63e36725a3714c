"""What differs between model families, as one protocol: prompts, image tensors, positions, names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from othink_ray.config.schema import RolloutConfig
from othink_ray.core.attention import Attention
from othink_ray.data.prompts import BadRow
from othink_ray.types import Message, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTensors:
    """Images as the vision tower takes them; those of several prompts are theirs one after the other."""

    pixels: Tensor  # (patches or tiles, ...) of all images
    grids: Tensor  # (images, ...): how the patches of each lie, or how many tiles it has; always on the CPU


class ModelError(ValueError):
    """A folder or hub name that holds no model of the family, cannot be reached, or cannot be used as configured."""


class Family(Protocol):
    """One model family, bound to one model folder."""

    processor_settings: dict[str, Any]
    """What keeps images within `model.min_pixels` and `model.max_pixels`: an engine's own processor needs it too."""

    banned_token_ids: tuple[int, ...]
    """Tokens that stand for pixels, or frame them: never sampled, and masked alike in the learner."""

    vllm_adapts_tower: bool
    """Whether vLLM serves adapters in the vision tower and its projector; in the text network it always does."""

    image_token_id: int
    eos_token_id: int
    pad_token_id: int

    opened: str
    """The end of every prompt that is part of the answer: `<think>` where the chat template opens the thought."""

    def prompt_token_ids(self, prompt: Prompt) -> list[int]:
        """The chat prompt with ONE placeholder per image: what an engine is given."""
        ...

    def encode_images(self, images: Sequence[bytes]) -> ImageTensors: ...

    def raw_pixels(self, images: ImageTensors) -> Tensor:
        """Their pixels before they were normalised, as uint8, in the same layout."""
        ...

    def image_token_counts(self, images: Sequence[bytes]) -> list[int]:
        """How many tokens each image takes, from its size alone."""
        ...

    def tokens_of(self, images: ImageTensors) -> int:
        """How many tokens the encoded images take together."""
        ...

    def expand(self, token_ids: Sequence[int], image_token_counts: Sequence[int]) -> list[int]:
        """The prompt with the tokens of its image, and what frames them, in the place of every placeholder."""
        ...

    def prompt_positions(self, token_ids: Tensor, images: ImageTensors) -> Tensor:
        """Position ids (axes, L) of an expanded prompt; an answer goes on at their maximum + 1 on every axis."""
        ...

    def smallest_image(self) -> bytes:
        """An image of as few tokens as can be, for a micro-batch without any: all ranks must run the vision tower."""
        ...

    def encode_text(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]: ...

    def answer_texts(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """The answers of these sampled tokens as they are graded and shown: `opened`, then the tokens decoded."""
        ...

    def load_network(self, dtype: torch.dtype) -> nn.Module: ...

    def skeleton(self) -> nn.Module:
        """The network without its weights: its modules and their shapes."""
        ...

    def vision_tower(self, network: nn.Module) -> nn.Module:
        """All that `image_features` runs."""
        ...

    def projectors(self, network: nn.Module) -> list[nn.Module]:
        """What brings the tower's features to the width of the text; it may lie inside the tower."""
        ...

    def layers(self, network: nn.Module) -> list[nn.Module]:
        """The repeated ones of both towers, where nearly all of the work is; the text's come last."""
        ...

    def image_features(self, network: nn.Module, images: ImageTensors, *, packed: bool = False) -> Tensor:
        """(image tokens, ...), image after image: all that `hidden_states` needs of them.

        If `packed`, images of different sizes are attended to in one kernel: for GPUs, and the network of
        `load_network`.
        """
        ...

    def image_inputs(self, images: ImageTensors) -> dict[str, Tensor]:
        """The images as the keywords of the network's own forward."""
        ...

    def hidden_states(
        self,
        network: nn.Module,
        *,
        token_ids: Tensor,
        position_ids: Tensor,
        features: Tensor,
        attention: Attention,
        asked: Tensor,
    ) -> Tensor:
        """Last hidden states (K, H) of the places (K,) asked for in one line of tokens (N,) at positions (axes, N)."""
        ...

    def output_weight(self, network: nn.Module) -> Tensor:
        """The matrix (V, H) that turns hidden states into logits."""
        ...

    def save(self, folder: Path, network: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write `weights`, under the names of `network`, its configuration and the processor into an empty folder.

        The folder is one of plain Hugging Face, and loads by default in the widest dtype of the weights. They are
        taken one by one and written in files of about a GiB, so that no more than that of them is held at a time.
        """
        ...


_ASKED = Message(role="user", text="?")
_ANSWERED = Message(role="assistant", text="§past answer§")


def opened_by(render: Callable[[Sequence[Message], bool], str]) -> str:
    """The text that the template's generation prompt adds to the header of an answer; empty for most models.

    `render` writes a chat, with the generation prompt or without. The header is what stands before a past answer, one
    that another question follows: of the last answer a template may show more (Qwen3 adds an empty thought).
    """
    prompt = render([_ASKED], True)
    if prompt == render([_ASKED], False):
        return ""
    header = render([_ASKED, _ANSWERED, _ASKED], False).partition(_ANSWERED.text)[0]
    if prompt.startswith(header):
        return prompt[len(header) :]
    if header.startswith(prompt) and header[len(prompt) :].isspace():
        return ""
    # Past answers are shown after something else, such as an empty thought in each: an open thought is what is left.
    opened = prompt[prompt.rfind("<think>") :] if "<think>" in prompt else ""
    return "" if "</think>" in opened else opened


def modules_by_part(family: Family, network: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Each module with its part (text, vision or projector) and its path."""
    projector = {id(module) for each in family.projectors(network) for module in each.modules()}
    tower = {id(module) for module in family.vision_tower(network).modules()}
    for path, module in network.named_modules():
        part = "projector" if id(module) in projector else "vision" if id(module) in tower else "text"
        yield part, path, module


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

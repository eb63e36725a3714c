"""The `Family` protocol: everything that differs between model families, and helpers on top of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from othink_ray.config.schema import RolloutConfig
from othink_ray.core.attention import Attention
from othink_ray.types import Message, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTensors:
    """Preprocessed images, the vision tower's input; images of several prompts are concatenated in order."""

    pixels: Tensor  # (patches or tiles, ...) of all images
    grids: Tensor  # (images, ...): patch grid or number of tiles of each image; always on the CPU


class ModelError(ValueError):
    """A model folder or hub name that is of another family, unreachable, or unusable with this config."""


class Family(Protocol):
    """A model family, bound to one model folder or hub name."""

    processor_settings: dict[str, Any]
    """Processor keywords that enforce `model.min_pixels` and `model.max_pixels`, for the engine's processor too."""

    banned_token_ids: tuple[int, ...]
    """Image placeholder and delimiter tokens: never sampled, and masked the same way in the learner."""

    vllm_adapts_tower: bool
    """Whether vLLM serves LoRA adapters in the vision tower and projector; in the text model it always does."""

    image_token_id: int
    eos_token_id: int
    pad_token_id: int

    answer_prefix: str
    """Text that the chat template writes at the end of the prompt, such as `<think>`; usually empty."""

    def prompt_token_ids(self, prompt: Prompt) -> list[int]:
        """Return the chat prompt's token ids with ONE placeholder per image, the engine's input."""
        ...

    def encode_images(self, images: Sequence[bytes]) -> ImageTensors: ...

    def raw_pixels(self, images: ImageTensors) -> Tensor:
        """Return the pixels before normalization as uint8, in the same layout."""
        ...

    def image_token_counts(self, images: Sequence[bytes]) -> list[int]:
        """Return the number of tokens of each image, computed from its size alone."""
        ...

    def encoded_token_count(self, images: ImageTensors) -> int:
        """Return the total number of tokens of the encoded images."""
        ...

    def expand(self, token_ids: Sequence[int], image_token_counts: Sequence[int]) -> list[int]:
        """Return the token ids with each placeholder replaced by its image's tokens and their delimiters."""
        ...

    def prompt_positions(self, token_ids: Tensor, images: ImageTensors) -> Tensor:
        """Return position ids (axes, L) of an expanded prompt; an answer continues at their maximum + 1 on all axes."""
        ...

    def smallest_image(self) -> bytes:
        """Return an image with the fewest tokens, for micro-batches without images: all ranks run the vision tower."""
        ...

    def prompt_lengths(self, prompt: Prompt) -> tuple[int, int]:
        """Return the numbers of text and image tokens; raise BadRow if the text contains placeholder tokens."""
        ...

    def check_fits(self, rollout: RolloutConfig, prompt: Prompt) -> None:
        """Raise BadRow if the prompt with its images and a full-length answer exceeds the engines' limits."""
        ...

    def encode_text(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]: ...

    def answer_texts(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """Return answer texts as graded and logged: `answer_prefix` followed by the decoded tokens."""
        ...

    def load_network(self, dtype: torch.dtype) -> nn.Module: ...

    def meta_network(self) -> nn.Module:
        """Return the network on the meta device: modules and shapes without weights."""
        ...

    def vision_tower(self, network: nn.Module) -> nn.Module:
        """Return the module that holds everything `image_features` runs."""
        ...

    def projectors(self, network: nn.Module) -> list[nn.Module]:
        """Return the modules that project vision features to the text width; they may be inside the tower."""
        ...

    def layers(self, network: nn.Module) -> list[nn.Module]:
        """Return the transformer layers, vision first, then text: nearly all of the compute."""
        ...

    def image_features(self, network: nn.Module, images: ImageTensors, *, packed: bool = False) -> Tensor:
        """Return features (image tokens, ...) of all images in order, the input of `hidden_states`.

        If `packed`, attention runs over images of different sizes in one kernel; for GPUs, and only with a network
        from `load_network`.
        """
        ...

    def image_inputs(self, images: ImageTensors) -> dict[str, Tensor]:
        """Return the images as keyword arguments of the network's own forward."""
        ...

    def hidden_states(
        self,
        network: nn.Module,
        *,
        token_ids: Tensor,
        position_ids: Tensor,
        features: Tensor,
        attention: Attention,
        logit_indices: Tensor,
    ) -> Tensor:
        """Return the last hidden states (K, H) at `logit_indices` (K,) of one packed sequence.

        `token_ids` is (N,), `position_ids` (axes, N).
        """
        ...

    def output_weight(self, network: nn.Module) -> Tensor:
        """Return the output projection (V, H) from hidden states to logits."""
        ...

    def save(self, folder: Path, network: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write `weights` (named as in `network`), the config and the processor into an empty folder.

        The result is a plain Hugging Face folder whose default dtype is the widest of the weights. Weights are consumed
        one by one and written in shards of about 1 GiB, which bounds the memory held at a time.
        """
        ...


_QUESTION = Message(role="user", text="?")
_PAST_ANSWER = Message(role="assistant", text="§past answer§")


def find_answer_prefix(render: Callable[[Sequence[Message], bool], str]) -> str:
    """Return the text that the chat template's generation prompt adds after the answer header; usually empty.

    `render(messages, add_generation_prompt)` applies the template. The header is the text before a past answer,
    which another question follows: before the last answer a template may write more (Qwen3 adds an empty thought).
    """
    prompt = render([_QUESTION], True)
    if prompt == render([_QUESTION], False):
        return ""
    header = render([_QUESTION, _PAST_ANSWER, _QUESTION], False).partition(_PAST_ANSWER.text)[0]
    if prompt.startswith(header):
        return prompt[len(header) :]
    if header.startswith(prompt) and header[len(prompt) :].isspace():
        return ""
    # Past answers have another header, such as an empty thought in each: fall back to an unclosed <think>.
    prefix = prompt[prompt.rfind("<think>") :] if "<think>" in prompt else ""
    return "" if "</think>" in prefix else prefix


def modules_by_part(family: Family, network: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (part, path, module) for each module; part is text, vision or projector."""
    projector = {id(module) for root in family.projectors(network) for module in root.modules()}
    tower = {id(module) for module in family.vision_tower(network).modules()}
    for path, module in network.named_modules():
        part = "projector" if id(module) in projector else "vision" if id(module) in tower else "text"
        yield part, path, module

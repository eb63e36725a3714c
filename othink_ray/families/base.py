"""What differs between model families, as one protocol: prompts, image tensors, positions, names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from othink_ray.core.attention import Attention
from othink_ray.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTensors:
    """The images of one prompt as the vision tower takes them: pixels (patches, features), grids (images, 3)."""

    pixels: Tensor
    grids: Tensor


class Family(Protocol):
    """One model family, bound to one model folder."""

    banned_token_ids: tuple[int, ...]
    """Tokens that stand for pixels: never sampled, and masked alike in the learner."""

    image_token_id: int
    eos_token_id: int
    pad_token_id: int

    def prompt_token_ids(self, prompt: Prompt) -> list[int]:
        """The chat prompt with ONE placeholder per image: what an engine is given."""
        ...

    def encode_images(self, images: Sequence[bytes]) -> ImageTensors: ...

    def image_token_counts(self, images: Sequence[bytes]) -> list[int]:
        """How many tokens each image takes, from its size alone."""
        ...

    def tokens_of(self, images: ImageTensors) -> int:
        """How many tokens the encoded images take together."""
        ...

    def expand(self, token_ids: Sequence[int], image_token_counts: Sequence[int]) -> list[int]:
        """The prompt with every placeholder repeated as often as its image has tokens: what the network sees."""
        ...

    def prompt_positions(self, token_ids: Tensor, images: ImageTensors) -> Tensor:
        """Position ids (3, L) of an expanded prompt; an answer goes on at their maximum + 1 on all three axes."""
        ...

    def smallest_image(self) -> bytes:
        """An image of one token, for a micro-batch without any: all ranks must run the vision tower."""
        ...

    def encode_text(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]: ...

    def load_network(self, dtype: torch.dtype) -> nn.Module: ...

    def skeleton(self) -> nn.Module:
        """The network without its weights: its modules and their shapes."""
        ...

    def vision_tower(self, network: nn.Module) -> nn.Module: ...

    def projector(self, network: nn.Module) -> nn.Module:
        """What brings the tower's features to the width of the text; it may lie inside the tower."""
        ...

    def layers(self, network: nn.Module) -> list[nn.Module]:
        """The repeated ones of both towers, where nearly all of the work is."""
        ...

    def image_features(self, network: nn.Module, images: ImageTensors) -> Tensor:
        """(image tokens, H), image after image: what stands in for their placeholders."""
        ...

    def hidden_states(
        self, network: nn.Module, *, token_ids: Tensor, position_ids: Tensor, features: Tensor, attention: Attention
    ) -> Tensor:
        """Last hidden states (N, H) of one line of tokens (N,) at positions (3, N)."""
        ...

    def output_weight(self, network: nn.Module) -> Tensor:
        """The matrix (V, H) that turns hidden states into logits."""
        ...

    def save(self, folder: Path, network: nn.Module, state: dict[str, Any]) -> None:
        """Write a plain Hugging Face folder: `state` under the names of `network`, configuration, processor."""
        ...

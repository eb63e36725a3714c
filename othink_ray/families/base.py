"""What differs between model families, as one protocol: prompts, image tensors, positions, names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from othink_ray.core.attention import Attention
from othink_ray.types import Prompt


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

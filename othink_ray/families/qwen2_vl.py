"""Qwen2-VL: one placeholder per image, three-axis positions, patches packed along the first axis."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from othink_ray.core.attention import Attention
from othink_ray.data.pixels import decoded, size_of
from othink_ray.families.base import ImageTensors
from othink_ray.families.line_attention import IMAGE_ATTENTION, LINE_ATTENTION
from othink_ray.types import Prompt

_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class _PatchProjection(nn.Conv3d):
    """A convolution whose kernel is as large as what it is given: a matrix product, and several times as quick."""

    def forward(self, patches: Tensor) -> Tensor:
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class Qwen2VL:
    """The Qwen2-VL family, bound to a Hugging Face folder or hub name."""

    def __init__(self, path: str, *, min_pixels: int, max_pixels: int) -> None:
        self.path = path
        self.processor = AutoProcessor.from_pretrained(
            path, min_pixels=min_pixels, max_pixels=max_pixels, trust_remote_code=False
        )
        tokenizer = self.processor.tokenizer
        self.image_token_id: int = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.banned_token_ids = tuple(tokenizer.convert_tokens_to_ids(token) for token in _VISION_TOKENS)
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = tokenizer.pad_token_id
        self.merge: int = self.processor.image_processor.merge_size

    def prompt_token_ids(self, prompt: Prompt) -> list[int]:
        chat = [
            {
                "role": message.role,
                "content": [{"type": "image"}] * message.images + [{"type": "text", "text": message.text}],
            }
            for message in prompt.messages
        ]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.encode_text(text)

    def encode_text(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        return list(self.processor.tokenizer.batch_decode(token_ids, skip_special_tokens=True))

    def encode_images(self, images: Sequence[bytes]) -> ImageTensors:
        if not images:
            return ImageTensors(pixels=torch.empty(0, 0), grids=torch.empty(0, 3, dtype=torch.long))
        encoded = self.processor.image_processor(images=[decoded(image) for image in images], return_tensors="pt")
        return ImageTensors(pixels=encoded["pixel_values"], grids=encoded["image_grid_thw"])

    def smallest_image(self) -> bytes:
        side = self.processor.image_processor.patch_size * self.merge
        buffer = io.BytesIO()
        Image.new("RGB", (side, side)).save(buffer, format="PNG")
        return buffer.getvalue()

    def image_token_counts(self, images: Sequence[bytes]) -> list[int]:
        sizes = [size_of(image) for image in images]
        patches = [
            self.processor.image_processor.get_number_of_image_patches(height, width, {}) for width, height in sizes
        ]
        return [count // self.merge**2 for count in patches]

    def tokens_of(self, images: ImageTensors) -> int:
        return int((images.grids.prod(dim=-1) // self.merge**2).sum())

    def expand(self, token_ids: Sequence[int], image_token_counts: Sequence[int]) -> list[int]:
        counts = iter(image_token_counts)
        expanded: list[int] = []
        for token in token_ids:
            expanded.extend([token] * (next(counts) if token == self.image_token_id else 1))
        return expanded

    def prompt_positions(self, token_ids: Tensor, images: ImageTensors) -> Tensor:
        grids = iter(images.grids.tolist())
        is_image = (token_ids == self.image_token_id).tolist()
        pieces: list[Tensor] = []
        start, index = 0, 0
        while index < len(is_image):
            if is_image[index]:
                frames, height, width = next(grids)
                rows, columns = height // self.merge, width // self.merge
                piece = torch.stack(
                    torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
                ).reshape(3, -1)
                step = max(rows, columns)
            else:
                step = next((i for i in range(index, len(is_image)) if is_image[i]), len(is_image)) - index
                piece = torch.arange(step).expand(3, -1)
            pieces.append(piece + start)
            start += step
            index += piece.shape[1]
        return torch.cat(pieces, dim=1)

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        network: nn.Module = AutoModelForImageTextToText.from_pretrained(
            self.path,
            dtype=dtype,
            use_safetensors=True,  # other files of weights can run code when they are read
            trust_remote_code=False,
            attn_implementation={"": "sdpa", "text_config": LINE_ATTENTION, "vision_config": IMAGE_ATTENTION},
        )
        tower: Any = self.vision_tower(network)
        tower.patch_embed.proj.__class__ = _PatchProjection
        return network

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            network: nn.Module = AutoModelForImageTextToText.from_config(
                AutoConfig.from_pretrained(self.path, trust_remote_code=False)
            )
        return network

    def vision_tower(self, network: nn.Module) -> nn.Module:
        body: Any = network.model
        tower: nn.Module = body.visual
        return tower

    def projector(self, network: nn.Module) -> nn.Module:
        tower: Any = self.vision_tower(network)
        merger: nn.Module = tower.merger
        return merger

    def layers(self, network: nn.Module) -> list[nn.Module]:
        body: Any = network.model
        return [*body.visual.blocks, *body.language_model.layers]

    def image_features(self, network: nn.Module, images: ImageTensors) -> Tensor:
        tower: Any = self.vision_tower(network)
        features: Tensor = tower(images.pixels.type(tower.dtype), grid_thw=images.grids).pooler_output
        return features

    def hidden_states(
        self, network: nn.Module, *, token_ids: Tensor, position_ids: Tensor, features: Tensor, attention: Attention
    ) -> Tensor:
        body: Any = network.model
        embedded = body.get_input_embeddings()(token_ids)
        is_image = token_ids == self.image_token_id
        output = body.language_model(
            inputs_embeds=embedded.masked_scatter(is_image[:, None], features.to(embedded.dtype))[None],
            position_ids=position_ids[:, None],
            attention_mask={"full_attention": attention},
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def output_weight(self, network: nn.Module) -> Tensor:
        head: Any = network.lm_head
        weight: Tensor = head.weight
        return weight

    def save(self, folder: Path, network: nn.Module, state: dict[str, Any]) -> None:
        target: Any = network
        target.save_pretrained(folder, state_dict=state)
        self.processor.save_pretrained(folder)
        readable = (folder / "config.json").stat().st_mode
        for weights in folder.glob("*.safetensors"):  # written for their owner alone, whatever the umask says
            weights.chmod(readable)

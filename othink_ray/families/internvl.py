"""InternVL 3 and 3.5 as implemented in transformers: square tiles, plus a thumbnail tile if there are several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from othink_ray.data.prompts import decode_image, image_size
from othink_ray.families.base import ImageTensors, ModelError
from othink_ray.families.hugging_face import HuggingFaceFamily, black_square


class InternVL(HuggingFaceFamily):
    """InternVL; pixels are (tiles, 3, side, side), grids (images, 1) tiles per image, positions have one axis."""

    vision_tokens = ("<img>", "<IMG_CONTEXT>", "</img>", "<video>")
    vllm_adapts_tower = False

    def __init__(self, path: str, *, min_pixels: int, max_pixels: int) -> None:
        self.side: int = AutoImageProcessor.from_pretrained(path, trust_remote_code=False).size.height
        tile = self.side**2
        if max_pixels < tile:
            raise ModelError(
                f"model.max_pixels = {max_pixels} must be at least {tile}: {path} splits images into tiles of "
                f"{self.side} x {self.side} pixels; set model.max_pixels={tile} or more"
            )
        tiles = {"min_patches": max(1, min_pixels // tile), "max_patches": max_pixels // tile}
        super().__init__(path, {"crop_to_patches": True, **tiles})
        self.tokens_per_tile: int = self.processor.image_seq_length
        self.delimiters: tuple[int, int] = (self.processor.start_image_token_id, self.processor.end_image_token_id)

    def encode_images(self, images: Sequence[bytes]) -> ImageTensors:
        if not images:
            return ImageTensors(pixels=torch.empty(0, 0), grids=torch.empty(0, 1, dtype=torch.long))
        encoded = self.processor.image_processor(images=[decode_image(image) for image in images], return_tensors="pt")
        return ImageTensors(pixels=encoded["pixel_values"], grids=encoded["num_patches"][:, None])

    def smallest_image(self) -> bytes:
        return black_square(self.side)

    def image_token_counts(self, images: Sequence[bytes]) -> list[int]:
        sizes = [image_size(image) for image in images]
        tiles = [self.processor.image_processor.get_number_of_image_patches(height, width) for width, height in sizes]
        return [count * self.tokens_per_tile for count in tiles]

    def encoded_token_count(self, images: ImageTensors) -> int:
        return int(images.grids.sum()) * self.tokens_per_tile

    def _image_tokens(self, count: int) -> list[int]:
        start, end = self.delimiters
        return [start, *super()._image_tokens(count), end]

    def prompt_positions(self, token_ids: Tensor, images: ImageTensors) -> Tensor:
        return torch.arange(len(token_ids))[None]

    def image_inputs(self, images: ImageTensors) -> dict[str, Tensor]:
        return {"pixel_values": images.pixels}

    def vision_tower(self, network: nn.Module) -> nn.Module:
        body: Any = network.model
        return nn.ModuleList([body.vision_tower, body.multi_modal_projector])

    def projectors(self, network: nn.Module) -> list[nn.Module]:
        body: Any = network.model
        return [body.multi_modal_projector]

    def layers(self, network: nn.Module) -> list[nn.Module]:
        body: Any = network.model
        return [*body.vision_tower.encoder.layer, *body.language_model.layers]

    def image_features(self, network: nn.Module, images: ImageTensors, *, packed: bool = False) -> Tensor:
        """Ignore `packed`: tiles have one size and form a single batch anyway."""
        body: Any = network.model
        features: Tensor = body.get_image_features(images.pixels).pooler_output
        return features.flatten(0, 1)

    def _text_inputs(self, embedded: Tensor, is_image: Tensor, features: Tensor) -> dict[str, Any]:
        """Pass an empty mask: the packed sequence's attention defines visibility."""
        return super()._text_inputs(embedded, is_image, features) | {"attention_mask": {"full_attention": None}}

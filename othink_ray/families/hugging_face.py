"""Base class of the families that transformers implements, and the attention functions registered with it.

Text layers run the packed sequence's attention, which the text model passes to every layer as the keyword
`packed_attention`. Vision layers run image attention, in blocks where that is faster.
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from othink_ray.config.schema import RolloutConfig
from othink_ray.core.attention import Attention, kernel_shape
from othink_ray.core.blocks import attend_in_blocks, blocks_are_faster, blocks_of_image
from othink_ray.core.flex import PackedImages
from othink_ray.cpu import kernels
from othink_ray.data.prompts import BadRow
from othink_ray.families.base import ImageTensors, find_answer_prefix
from othink_ray.types import Message, Prompt

PACKED_ATTENTION, IMAGE_ATTENTION = "packed_sequence", "image"
SHARD_BYTES = 2**30  # a saved file is closed by the first weight that brings it to this size
_ATTENTION = {"": "sdpa", "text_config": PACKED_ATTENTION, "vision_config": IMAGE_ATTENTION}
_WEIGHTS = "model.safetensors"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed_attention: Attention | None = None,
    in_last_layer: bool = False,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend with `packed_attention`; without it, exactly as the unmodified network, mask included."""
    if packed_attention is not None:
        attend = packed_attention.in_last_layer if in_last_layer else packed_attention
        return attend(query, key, value, scaling), None
    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    return attended, None


def _attend_image(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    images: PackedImages | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend among the patches of each image or tile: a batch of one size, or of any sizes with `images`."""
    if query.is_meta:
        return kernel_shape(query, key, value), None
    if images is not None:
        return images(query, key, value, scaling), None
    by_kernel = kernels.enabled_for_images() and kernels.supports_head_dim(query)
    # In half precision use torch's kernel, as vLLM does: unlike other kernels, it rounds the softmax probabilities.
    by_torch = query.device.type != "cpu" or query.dtype != torch.float32
    if by_torch or not (by_kernel or blocks_are_faster(query.shape[2])):
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
        return attended, None
    queries, keys, values = (heads.flatten(0, 1) for heads in (query, key, value))
    if by_kernel:
        attended = kernels.fused_attention(queries, keys, values, kernels.image_block(query.shape[2]), scaling)
        return attended.unflatten(1, query.shape[:2]).transpose(0, 1), None
    attended = attend_in_blocks(queries, keys, values, blocks_of_image(query.shape[2]), scaling)
    return attended.view_as(query).transpose(1, 2), None


# Excluded from torch.compile: packed sequences differ every time, and image attention is many small matmuls.
AttentionInterface.register(PACKED_ATTENTION, torch.compiler.disable(_attend))
AttentionInterface.register(IMAGE_ATTENTION, torch.compiler.disable(_attend_image))
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


class _Pruned:
    """Mixin before a text layer class: computes its output only where logits are needed.

    Fits all text models here, whose layers differ only in their attention.
    """

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, logit_indices: Tensor | None = None, **settings: Any) -> Tensor:
        """Map (1, N, H) to (1, K, H) at `logit_indices` (K,), or to (1, N, H) without them, as in sampling."""
        if logit_indices is None:
            full: Tensor = super().forward(hidden_states, **settings)  # type: ignore[misc]
            return full
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), in_last_layer=True, **settings)
        residual = hidden_states.index_select(1, logit_indices) + attended.index_select(1, logit_indices)
        output: Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return output


def prune_last_layer(layer: nn.Module) -> None:
    """Make a text layer compute its output only where logits are needed, in place."""
    original = type(layer)
    layer.__class__ = type(f"Pruned{original.__name__}", (_Pruned, original), {})


def is_pruned(layer: nn.Module) -> bool:
    return isinstance(layer, _Pruned)


class HuggingFaceFamily(ABC):
    """A family implemented in transformers, bound to a Hugging Face folder or hub name."""

    vision_tokens: tuple[str, ...]
    """Image and video placeholder and delimiter tokens."""
    vllm_adapts_tower = True

    def __init__(self, path: str, processor_settings: dict[str, Any]) -> None:
        self.path, self.processor_settings = path, processor_settings
        self.processor = AutoProcessor.from_pretrained(path, **processor_settings, trust_remote_code=False)
        tokenizer = self.processor.tokenizer
        self.image_token_id: int = self.processor.image_token_id
        self.banned_token_ids = tuple(tokenizer.convert_tokens_to_ids(token) for token in self.vision_tokens)
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = tokenizer.pad_token_id
        self.answer_prefix = find_answer_prefix(self._render_chat)

    def prompt_token_ids(self, prompt: Prompt) -> list[int]:
        return self.encode_text(self._render_chat(prompt.messages, True))

    def _render_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Apply the chat template to the messages."""
        chat = [
            {
                "role": message.role,
                "content": [{"type": "image"}] * message.images + [{"type": "text", "text": message.text}],
            }
            for message in messages
        ]
        text: str = self.processor.apply_chat_template(
            chat, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return text

    @abstractmethod
    def image_token_counts(self, images: Sequence[bytes]) -> list[int]: ...

    def prompt_lengths(self, prompt: Prompt) -> tuple[int, int]:
        token_ids = self.prompt_token_ids(prompt)
        placeholders = token_ids.count(self.image_token_id)
        if placeholders != len(prompt.images):
            reason = f"its text contains {placeholders - len(prompt.images)} image placeholder token(s) of the model"
            raise BadRow(prompt.id, reason, "remove them from the question")
        counts = self.image_token_counts(prompt.images)
        return len(self.expand(token_ids, counts)) - sum(counts), sum(counts)

    def check_fits(self, rollout: RolloutConfig, prompt: Prompt) -> None:
        if len(prompt.images) > rollout.max_images:
            reason = f"it has {len(prompt.images)} images, more than rollout.max_images = {rollout.max_images}"
            raise BadRow(prompt.id, reason, "raise rollout.max_images or remove the row")
        text_tokens, image_tokens = self.prompt_lengths(prompt)
        needed = text_tokens + image_tokens + rollout.max_tokens
        if needed > rollout.max_model_len:
            reason = (
                f"{text_tokens} text tokens, {image_tokens} image tokens and rollout.max_tokens = {rollout.max_tokens} "
                f"add up to {needed}, more than rollout.max_model_len = {rollout.max_model_len}"
            )
            raise BadRow(prompt.id, reason, "raise rollout.max_model_len, lower model.max_pixels or remove the row")

    def answer_texts(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        return [self.answer_prefix + text for text in self.decode(token_ids)]

    def raw_pixels(self, images: ImageTensors) -> Tensor:
        """Invert the normalization exactly: pixels are integers, and float32 keeps them distinct.

        Channels are the first axis of each patch.
        """
        processor = self.processor.image_processor
        mean, std = (torch.tensor(values)[:, None] for values in (processor.image_mean, processor.image_std))
        channels = images.pixels.float().reshape(len(images.pixels), len(mean), -1)
        return (255 * (channels * std + mean)).round().to(torch.uint8).reshape(images.pixels.shape)

    def encode_text(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        return list(self.processor.tokenizer.batch_decode(token_ids, skip_special_tokens=True))

    def expand(self, token_ids: Sequence[int], image_token_counts: Sequence[int]) -> list[int]:
        counts = iter(image_token_counts)
        expanded: list[int] = []
        for token in token_ids:
            expanded.extend(self._image_tokens(next(counts)) if token == self.image_token_id else [token])
        return expanded

    def _image_tokens(self, count: int) -> list[int]:
        """Return the expansion of the placeholder of an image of `count` tokens."""
        return [self.image_token_id] * count

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        network: nn.Module = AutoModelForImageTextToText.from_pretrained(
            self.path,
            dtype=dtype,
            use_safetensors=True,  # pickled weights can run code when loaded
            trust_remote_code=False,
            attn_implementation=_ATTENTION,
        )
        return network

    def meta_network(self) -> nn.Module:
        with torch.device("meta"):
            network: nn.Module = AutoModelForImageTextToText.from_config(
                AutoConfig.from_pretrained(self.path, trust_remote_code=False), attn_implementation=_ATTENTION
            )
        return network

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
        body: Any = network.model
        embedded = body.get_input_embeddings()(token_ids)
        output = body.language_model(
            **self._text_inputs(embedded, token_ids == self.image_token_id, features.to(embedded.dtype)),
            position_ids=position_ids[:, None].squeeze(0),  # text models with one axis expect no axis dimension
            packed_attention=attention,
            logit_indices=logit_indices,
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden if is_pruned(body.language_model.layers[-1]) else hidden[logit_indices]

    def _text_inputs(self, embedded: Tensor, is_image: Tensor, features: Tensor) -> dict[str, Any]:
        """Return the text model's inputs from token embeddings (N, H), the image mask (N,) and image features."""
        return {"inputs_embeds": embedded.masked_scatter(is_image[:, None], features)[None]}

    def output_weight(self, network: nn.Module) -> Tensor:
        head: Any = network.lm_head
        weight: Tensor = head.weight
        return weight

    def save(self, folder: Path, network: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
        target: Any = network
        files: list[Path] = []
        dtypes: set[torch.dtype] = set()
        for shard in _shards(weights):
            dtypes |= {weight.dtype for weight in shard.values()}
            target.save_pretrained(folder, state_dict=shard)
            shard.clear()  # free it before the next one is collected
            files.append((folder / _WEIGHTS).rename(folder / f"part-{len(files)}.safetensors"))
        _name_shards(folder, files)
        _set_default_dtype(folder / "config.json", reduce(torch.promote_types, dtypes))
        self.processor.save_pretrained(folder)
        readable = (folder / "config.json").stat().st_mode
        for file in folder.glob("*.safetensors"):  # created readable by their owner only, whatever the umask
            file.chmod(readable)


def _shards(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Group weights into shards of at least SHARD_BYTES, without keeping a reference to a weight once yielded."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        shard[name] = weight
        size += weight.nbytes
        del weight
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _name_shards(folder: Path, files: Sequence[Path]) -> None:
    """Rename the files to the Hugging Face layout: one file, or numbered ones with an index."""
    if len(files) == 1:
        files[0].rename(folder / _WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        renamed = file.rename(folder / f"model-{number:05}-of-{len(files):05}.safetensors")
        with safe_open(renamed, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), renamed.name)
    total = sum(file.stat().st_size for file in folder.glob("model-*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{_WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _set_default_dtype(file: Path, dtype: torch.dtype) -> None:
    """Write `dtype` into every section of config.json: the dtype in which the folder loads by default."""

    def with_dtype(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            key: with_dtype(value) if isinstance(value, dict) else str(dtype).split(".")[1] if key == "dtype" else value
            for key, value in settings.items()
        }

    file.write_text(json.dumps(with_dtype(json.loads(file.read_text())), indent=2) + "\n")


def black_square(side: int) -> bytes:
    """Return a black PNG of side x side pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, format="PNG")
    return buffer.getvalue()

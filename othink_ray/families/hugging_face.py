"""How transformers' models attend: text the way a line asks, images in blocks where that is quicker.

Text models hand the keyword `line`, the attention itself, down to every layer.
"""

from __future__ import annotations

import io
import json
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

from othink_ray.core import fused
from othink_ray.core.attention import Attention, kernel_shape
from othink_ray.core.blocks import attend_in_blocks, blocks_of_image, worth_it
from othink_ray.core.flex import PackedImages
from othink_ray.families.base import ImageTensors, opened_by
from othink_ray.types import Message, Prompt

LINE_ATTENTION, IMAGE_ATTENTION = "line", "image"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    line: Attention | None = None,
    in_last_layer: bool = False,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Without a line the network is the unmodified one, mask and all."""
    if line is not None:
        attend = line.in_last_layer if in_last_layer else line
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
    """All patches of an image, or of a tile, among themselves; there may be several of the same size, or `images`."""
    if query.is_meta:
        return kernel_shape(query, key, value), None
    if images is not None:
        return images(query, key, value, scaling), None
    by_kernel = fused.is_chosen() and fused.suits(query)
    # In half precision torch's kernel, which is vLLM's too: it rounds the softmax's shares, and others do not.
    by_torch = query.device.type != "cpu" or query.dtype != torch.float32
    if by_torch or not (by_kernel or worth_it(query.shape[2])):
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
        return attended, None
    asked, seen, shown = (heads.flatten(0, 1) for heads in (query, key, value))
    if by_kernel:
        attended = fused.attend_fused(asked, seen, shown, fused.blocks_of_image(query.shape[2]), scaling)
        return attended.unflatten(1, query.shape[:2]).transpose(0, 1), None
    attended = attend_in_blocks(asked, seen, shown, blocks_of_image(query.shape[2]), scaling)
    return attended.view_as(query).transpose(1, 2), None


# Not for torch's compiler: a line is different each time, and an image is many small products.
AttentionInterface.register(LINE_ATTENTION, torch.compiler.disable(_attend))
AttentionInterface.register(IMAGE_ATTENTION, torch.compiler.disable(_attend_image))
AttentionMaskInterface.register(LINE_ATTENTION, sdpa_mask)


class _Pruned:
    """Before a layer of any of the text models here, which are alike but for their attention."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, asked: Tensor | None = None, **settings: Any) -> Tensor:
        """(1, N, H), and the K places asked for -> (1, K, H); all N where nothing is said of them, as in sampling."""
        if asked is None:
            whole: Tensor = super().forward(hidden_states, **settings)  # type: ignore[misc]
            return whole
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), in_last_layer=True, **settings)
        kept = hidden_states.index_select(1, asked) + attended.index_select(1, asked)
        read: Tensor = kept + self.mlp(self.post_attention_layernorm(kept))
        return read


def prune_last_layer(layer: nn.Module) -> None:
    """Make it go on only where it is asked to."""
    plain = type(layer)
    layer.__class__ = type(f"Narrow{plain.__name__}", (_Pruned, plain), {})


def is_pruned(layer: nn.Module) -> bool:
    return isinstance(layer, _Pruned)


_ATTENTION = {"": "sdpa", "text_config": LINE_ATTENTION, "vision_config": IMAGE_ATTENTION}
PART_BYTES = 2**30  # of weights in one file of a saved model, beside its last weight
_WEIGHTS = "model.safetensors"


class HuggingFaceFamily:
    """Bound to a Hugging Face folder or hub name."""

    vision_tokens: tuple[str, ...]
    """Those that stand for pixels, or frame them."""
    vllm_adapts_tower = True

    def __init__(self, path: str, processor_settings: dict[str, Any]) -> None:
        self.path, self.processor_settings = path, processor_settings
        self.processor = AutoProcessor.from_pretrained(path, **processor_settings, trust_remote_code=False)
        tokenizer = self.processor.tokenizer
        self.image_token_id: int = self.processor.image_token_id
        self.banned_token_ids = tuple(tokenizer.convert_tokens_to_ids(token) for token in self.vision_tokens)
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = tokenizer.pad_token_id
        self.opened = opened_by(self._chat)

    def prompt_token_ids(self, prompt: Prompt) -> list[int]:
        return self.encode_text(self._chat(prompt.messages, True))

    def _chat(self, messages: Sequence[Message], asks: bool) -> str:
        """The messages as the chat template writes them, with its generation prompt if the chat `asks`."""
        chat = [
            {
                "role": message.role,
                "content": [{"type": "image"}] * message.images + [{"type": "text", "text": message.text}],
            }
            for message in messages
        ]
        text: str = self.processor.apply_chat_template(chat, add_generation_prompt=asks, tokenize=False)
        return text

    def answer_texts(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        return [self.opened + text for text in self.decode(token_ids)]

    def raw_pixels(self, images: ImageTensors) -> Tensor:
        """Exact: pixels are whole numbers, and float32 keeps them apart. Channels are the first axis of each patch."""
        processor = self.processor.image_processor
        mean, std = (torch.tensor(each)[:, None] for each in (processor.image_mean, processor.image_std))
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
            expanded.extend(self._shown(next(counts)) if token == self.image_token_id else [token])
        return expanded

    def _shown(self, count: int) -> list[int]:
        """What the placeholder of an image of so many tokens becomes."""
        return [self.image_token_id] * count

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        network: nn.Module = AutoModelForImageTextToText.from_pretrained(
            self.path,
            dtype=dtype,
            use_safetensors=True,  # other files of weights can run code when they are read
            trust_remote_code=False,
            attn_implementation=_ATTENTION,
        )
        return network

    def skeleton(self) -> nn.Module:
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
        asked: Tensor,
    ) -> Tensor:
        body: Any = network.model
        embedded = body.get_input_embeddings()(token_ids)
        output = body.language_model(
            **self._with_images(embedded, token_ids == self.image_token_id, features.to(embedded.dtype)),
            position_ids=position_ids[:, None].squeeze(0),  # where there is one axis only, text models want none
            line=attention,
            asked=asked,
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden if is_pruned(body.language_model.layers[-1]) else hidden[asked]

    def _with_images(self, embedded: Tensor, is_image: Tensor, features: Tensor) -> dict[str, Any]:
        """What the text model is given for embedded tokens (N, H) and the features of the images among them."""
        return {"inputs_embeds": embedded.masked_scatter(is_image[:, None], features)[None]}

    def output_weight(self, network: nn.Module) -> Tensor:
        head: Any = network.lm_head
        weight: Tensor = head.weight
        return weight

    def save(self, folder: Path, network: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
        target: Any = network
        files: list[Path] = []
        dtypes: set[torch.dtype] = set()
        for part in _parts(weights):
            dtypes |= {weight.dtype for weight in part.values()}
            target.save_pretrained(folder, state_dict=part)
            part.clear()
            files.append((folder / _WEIGHTS).rename(folder / f"part-{len(files)}.safetensors"))
        _name_parts(folder, files)
        _declare(folder / "config.json", reduce(torch.promote_types, dtypes))
        self.processor.save_pretrained(folder)
        readable = (folder / "config.json").stat().st_mode
        for file in folder.glob("*.safetensors"):  # written for their owner alone, whatever the umask says
            file.chmod(readable)


def _parts(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Weights that are held at a time: as soon as they reach PART_BYTES they are handed on, and dropped."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        part[name] = weight
        size += weight.nbytes
        del weight
        if size >= PART_BYTES:
            yield part
            part, size = {}, 0
    if part:
        yield part


def _name_parts(folder: Path, files: Sequence[Path]) -> None:
    """As readers expect them: one file, or numbered ones with an index."""
    if len(files) == 1:
        files[0].rename(folder / _WEIGHTS)
        return
    places: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        named = file.rename(folder / f"model-{number:05}-of-{len(files):05}.safetensors")
        with safe_open(named, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), named.name)
    total = sum(file.stat().st_size for file in folder.glob("model-*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{_WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _declare(file: Path, dtype: torch.dtype) -> None:
    """Have the folder loaded in this dtype, the widest of its weights, where nobody asks for another one."""

    def declared(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            key: declared(value) if isinstance(value, dict) else str(dtype).split(".")[1] if key == "dtype" else value
            for key, value in settings.items()
        }

    file.write_text(json.dumps(declared(json.loads(file.read_text())), indent=2) + "\n")


def black_square(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, format="PNG")
    return buffer.getvalue()

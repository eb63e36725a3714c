"""Memory of a network's forward and backward pass, measured by running its real class on the meta device.

No weight is loaded and nothing is computed: both passes of a model with billions of parameters take about a second.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from othink_ray.config.schema import LearnerConfig
from othink_ray.core.attention import KernelShape
from othink_ray.engines.policy import choose_trained, features_frozen
from othink_ray.families.base import Family, ImageTensors
from othink_ray.families.hugging_face import prune_last_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkShape:
    """Sizes of a network that determine its memory, in elements."""

    weights: int
    trained: int
    largest: int  # of the largest parameter
    vocabulary: int
    width: int  # of the last hidden states
    head_trained: bool
    kv_per_token: int  # keys and values of all layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Activation memory of one micro-batch in bytes, without weights and their gradients."""

    kept: int  # between forward and backward: tensors saved for backward, and the hidden states
    peak: int  # during forward and backward; parameter gradients are not counted
    logit_tokens: int  # number of tokens, not bytes, that have logits: those of the answers


def meta_learner_network(family: Family, learner: LearnerConfig, dtype: torch.dtype) -> nn.Module:
    """Return the network as a learner rank trains it, on the meta device."""
    network: Any = family.meta_network().to(dtype)
    if learner.prune_last_layer:
        prune_last_layer(family.layers(network)[-1])
    choose_trained(family, network, learner)
    network.to(dtype)
    if learner.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    trained: nn.Module = network.train()
    return trained


def network_shape(family: Family, network: Any) -> NetworkShape:
    parameters, head = list(network.parameters()), family.output_weight(network)
    text = network.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return NetworkShape(
        weights=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        largest=max(parameter.numel() for parameter in parameters),
        vocabulary=head.shape[0],
        width=head.shape[1],
        head_trained=head.requires_grad,
        kv_per_token=2 * text.num_hidden_layers * text.num_key_value_heads * head_dim,
    )


def activations(
    family: Family, network: nn.Module, tokens: int, images: Sequence[bytes], logit_tokens: int
) -> Activations:
    """Return the memory of a packed sequence of `tokens`, image tokens included; `logit_tokens` of them have logits."""
    encoded = family.encode_images(images)
    with _LiveBytes() as live, _OnMeta():
        hidden = _hidden(family, network, tokens, encoded, logit_tokens)
        kept = live.now
        hooks = [
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
            for parameter in network.parameters()
            if parameter.requires_grad
        ]
        hidden.backward(torch.empty_like(hidden))
    for hook in hooks:
        hook.remove()
    pixels = encoded.pixels.nbytes
    return Activations(kept=kept + pixels, peak=live.peak + pixels, logit_tokens=logit_tokens)


def forward_peak(family: Family, network: nn.Module, tokens: int, images: Sequence[bytes]) -> int:
    """Return the peak bytes of a no-grad pass over `tokens`, image tokens included."""
    encoded = family.encode_images(images)
    with _LiveBytes() as live, _OnMeta(), torch.no_grad():
        _hidden(family, network, tokens, encoded, logit_tokens=tokens)
    peak: int = live.peak + encoded.pixels.nbytes
    return peak


def _hidden(family: Family, network: nn.Module, tokens: int, images: ImageTensors, logit_tokens: int) -> Tensor:
    """Return hidden states (logit_tokens, H), computed by the same calls as in `Policy`."""
    image_tokens = family.encoded_token_count(images)
    token_ids = torch.tensor([family.image_token_id] * image_tokens + [family.eos_token_id] * (tokens - image_tokens))
    axes = len(family.prompt_positions(token_ids[image_tokens : image_tokens + 1], images))
    with torch.set_grad_enabled(torch.is_grad_enabled() and not features_frozen(family, network)):
        pixels = torch.empty_like(images.pixels, device="meta")
        features = family.image_features(network, ImageTensors(pixels=pixels, grids=images.grids))
    return family.hidden_states(
        network,
        token_ids=token_ids,
        position_ids=torch.zeros(axes, tokens, dtype=torch.long, device="meta"),
        features=features,
        attention=KernelShape(),
        logit_indices=torch.arange(logit_tokens, device="meta"),
    )


def _drop_gradient(parameter: Tensor) -> None:
    """Drop a gradient as soon as it exists: DeepSpeed moves it to a buffer, which the memory plan counts."""
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that were created inside this mode, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                storage = leaf.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._alive:
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class _OnMeta(TorchFunctionMode):
    """Moves CPU tensors to the meta device where an operation mixes both: grids and positions have real values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = (args, dict(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        if any(leaf.is_meta for leaf in leaves) and func not in _BY_VALUE:
            given = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, given)
        return func(*given[0], **given[1])


# Indexing is left as it is: the size of its result depends on the values of the index.
_BY_VALUE = (Tensor.__getitem__, Tensor.__setitem__)

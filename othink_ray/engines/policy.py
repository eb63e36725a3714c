"""The policy network: its logprobs with the sampler's temperature and token bans, and the choice of trained weights."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from othink_ray.config.bounds import FROZEN
from othink_ray.config.schema import LearnerConfig
from othink_ray.core.attention import packs_images
from othink_ray.core.logprobs import candidate_logprobs, token_logprobs
from othink_ray.engines.collate import MicroBatch
from othink_ray.families.base import Family, modules_by_part

# vLLM's lowest logit_bias. A token at -100 nats is never sampled, and engine and learner compute the same softmax.
BANNED_BIAS = -100.0

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Wanted = Literal["logprobs", "features"]


def train_without_dropout(network: nn.Module) -> None:
    """Switch to training mode, which gradient checkpointing needs, with all dropout rates at 0; warn if any was higher.

    An update compares the policy's logprobs with the sampler's, the old policy's and the reference's. With dropout,
    equal weights would give different logprobs, and two passes over one token would disagree.
    """
    dropouts = list(_dropout_rates(network))
    for _, module, name, _ in dropouts:
        setattr(module, name, 0.0)
    if dropouts:
        path, _, name, rate = dropouts[0]
        warnings.warn(
            f"the model has {len(dropouts)} dropout rates above 0 ({path}.{name} = {rate}, ...): it is trained without "
            "dropout, because its logprobs are compared with the sampler's",
            stacklevel=2,
        )
    network.train()


def _dropout_rates(network: nn.Module) -> Iterator[tuple[str, nn.Module, str, float]]:
    """Yield (module path, module, attribute, rate) of each rate above 0, of dropout modules and attention layers."""
    for path, module in network.named_modules():
        for name, rate in vars(module).items():
            is_rate = "dropout" in name or "drop_path" in name or (name == "p" and isinstance(module, _DropoutNd))
            if is_rate and isinstance(rate, float) and rate > 0:
                yield path, module, name, rate


def checkpoint_layers(network: nn.Module) -> None:
    """Enable gradient checkpointing: save only each layer's input, and recompute the layer in backward.

    Works in training mode only.
    """
    model: Any = network
    model.gradient_checkpointing_enable({"use_reentrant": False})


class Policy(nn.Module):
    """A causal network with the sampler's temperature and ban on vision tokens applied to its logits."""

    def __init__(self, network: nn.Module, family: Family, temperature: float, logit_rows: int) -> None:
        super().__init__()
        self.network = network
        self.family = family
        self.temperature = temperature
        self.logit_rows = logit_rows
        self.encoded_images = 0

    def forward(
        self,
        batch: MicroBatch,
        *,
        features: Tensor | None = None,
        wanted: Wanted = "logprobs",
        candidates: Tensor | None = None,
    ) -> Any:
        """Return logprobs and entropies (M,), candidate logprobs (M, K), or image features (image tokens, H).

        Every use of the network goes through this method, because ZeRO-3's wrapper gathers sharded weights before it.
        `features` skips the vision tower. `candidates` (M, K) are token ids for each answer token, whose logprobs are
        returned instead of the targets'.
        """
        if features is None:
            features = self.image_features(batch)
        if wanted == "features":
            return features
        states = self.predicting_states(batch, features)
        return self.logprobs(batch, states) if candidates is None else self.candidate_logprobs(states, candidates)

    def image_features(self, batch: MicroBatch) -> Tensor:
        """Return the features (image tokens, H) of all images, and count the images."""
        self.encoded_images += len(batch.images.grids)
        packed = packs_images(batch.attention, batch.images.pixels.device)
        return self.family.image_features(self.network, batch.images, packed=packed)

    def predicting_states(self, batch: MicroBatch, features: Tensor) -> Tensor:
        """Return the hidden states (M, H) that predict the answer tokens."""
        hidden = self.family.hidden_states(
            self.network,
            token_ids=batch.token_ids,
            position_ids=batch.position_ids,
            features=features,
            attention=batch.attention,
            logit_indices=batch.logit_indices,
        )
        return hidden[batch.predictors]

    def logprobs(self, batch: MicroBatch, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return logprobs (M,) and detached entropies (M,) of the answer tokens, in nats."""
        weight = self.family.output_weight(self.network)
        return token_logprobs(
            states,
            weight,
            batch.targets,
            temperature=self.temperature,
            logit_bias=logit_bias(self.family, weight),
            chunk=self.logit_rows,
        )

    def candidate_logprobs(self, states: Tensor, candidates: Tensor) -> Tensor:
        """Return logprobs (M, K) of K tokens at each answer token's position, without gradient: for an audit."""
        weight = self.family.output_weight(self.network)
        return candidate_logprobs(
            states,
            weight,
            candidates,
            temperature=self.temperature,
            logit_bias=logit_bias(self.family, weight),
            chunk=self.logit_rows,
        )


def logit_bias(family: Family, weight: Tensor) -> Tensor:
    """Return a bias (V,) on the device of the head `weight`: BANNED_BIAS for vision tokens, 0 elsewhere."""
    bias = torch.zeros(weight.shape[0], device=weight.device)
    bias[list(family.banned_token_ids)] = BANNED_BIAS
    return bias


def choose_trained(family: Family, network: nn.Module, learner: LearnerConfig) -> None:
    """Add adapters or freeze parts: afterwards exactly the trained parameters require gradients."""
    frozen, lora = FROZEN[learner.freeze], learner.lora
    if lora.rank:
        from othink_ray.engines.lora import adapted_layers, add_adapters

        add_adapters(network, lora.rank, lora.alpha, adapted_layers(family, network, lora, frozen))
    else:
        for part, _, module in modules_by_part(family, network):
            if part in frozen:
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)


def parameter_groups(family: Family, network: nn.Module, learner: LearnerConfig) -> list[dict[str, Any]]:
    """Return optimizer parameter groups, one per learning rate: learner.lr times the group's `lr_scale`."""
    scales = {"vision": learner.vision_lr_scale, "projector": learner.projector_lr_scale}
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    grouped: set[int] = set()  # a tied weight belongs to several modules
    for part, _, module in modules_by_part(family, network):
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in grouped:
                grouped.add(id(parameter))
                groups[scales.get(part, 1.0)].append(parameter)
    return [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()]


def trains_all(learner: LearnerConfig) -> bool:
    """Return whether every push brings every weight: there are no adapters, and no part is frozen."""
    return not learner.lora.rank and not FROZEN[learner.freeze]


def count_trained(family: Family, learner: LearnerConfig) -> int:
    """Return the number of trained elements without loading weights; AdapterError where there is nothing to adapt."""
    network = family.meta_network()
    choose_trained(family, network, learner)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def features_frozen(family: Family, network: nn.Module) -> bool:
    """Return whether image features are constant during training: vision tower and projector are frozen."""
    return not any(
        parameter.requires_grad
        for part, _, module in modules_by_part(family, network)
        for parameter in module.parameters(recurse=False)
        if part != "text"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedWeight:
    """A trained tensor, and the factor by which a push scales it."""

    name: str
    parameter: Tensor
    scale: float = 1.0

    def pushed(self) -> Tensor:
        """Return the scaled tensor in the learner's compute dtype."""
        weight = self.parameter.detach()
        return weight if self.scale == 1.0 else weight * self.scale


def trained_weights(network: nn.Module) -> Iterator[TrainedWeight]:
    """Yield the trained tensors in a fixed order.

    For an adapter these are A and B, with the scale alpha / rank applied to B, so that engines add B A unscaled.
    """
    adapted = _adapters(network)
    for path, adapter in adapted.items():
        yield TrainedWeight(name=f"{path}.lora_A.weight", parameter=adapter.down)
        yield TrainedWeight(name=f"{path}.lora_B.weight", parameter=adapter.up, scale=adapter.scale)
    if not adapted:
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                yield TrainedWeight(name=name, parameter=parameter)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainWeight:
    """A weight of the plain network; an adapter adds scale * up @ down to it."""

    name: str
    base: Tensor
    factors: tuple[Tensor, ...]  # up (out, rank), down (rank, in); empty without an adapter
    scale: float

    @property
    def parts(self) -> list[Tensor]:
        return [self.base, *self.factors]

    def merged(self) -> Tensor:
        """Return the weight; with an adapter, merged in float32: in bfloat16 small updates would round away."""
        if not self.factors:
            return self.base.detach()
        up, down = (factor.detach().float() for factor in self.factors)
        return self.base.detach().float() + self.scale * (up @ down)


def plain_weights(network: nn.Module) -> Iterator[PlainWeight]:
    """Yield all weights in a fixed order, under the names that they have without adapters."""
    adapted = {f"{path}.base_layer": adapter for path, adapter in _adapters(network).items()}
    factors = {id(factor) for adapter in adapted.values() for factor in (adapter.up, adapter.down)}
    for name, parameter in network.named_parameters():
        if id(parameter) in factors:
            continue
        owner, _, kind = name.rpartition(".")
        adapter = adapted.get(owner)
        yield PlainWeight(
            name=name if adapter is None else f"{owner.removesuffix('.base_layer')}.{kind}",
            base=parameter,
            factors=() if adapter is None or kind != "weight" else (adapter.up, adapter.down),
            scale=1.0 if adapter is None else adapter.scale,
        )


def _adapters(network: nn.Module) -> Mapping[str, Any]:
    """Return the network's adapters by layer path; empty without LoRA."""
    if not hasattr(network, "peft_config"):  # which peft sets
        return {}
    from othink_ray.engines.lora import adapters

    return adapters(network)

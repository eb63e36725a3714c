"""The policy network with the sampler's temperature and token bans, and its training mode without dropout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from othink_ray.core.attention import packs_images
from othink_ray.core.logprobs import candidate_logprobs, token_logprobs
from othink_ray.engines.collate import MicroBatch
from othink_ray.families.base import Family


def train_without_dropout(network: nn.Module) -> None:
    """Switch to training mode, which gradient checkpointing needs, with all dropout rates at 0; warn if any was not.

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


# vLLM's lowest logit_bias. A token at -100 nats is never sampled, and engine and learner compute the same softmax.
BANNED_BIAS = -100.0

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Wanted = Literal["logprobs", "features"]


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
            asked=batch.asked,
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

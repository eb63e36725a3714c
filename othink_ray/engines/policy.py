"""The network as the learner uses it: logprobs of the answers in shared-prefix rows, as the sampler would give them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from othink_ray.core.attention import packs_images
from othink_ray.core.logprobs import candidate_logprobs, token_logprobs
from othink_ray.engines.micro_batch import MicroBatch
from othink_ray.families.base import Family

# What vLLM's logit_bias can do at most; a token at -100 nats is never sampled, and both sides compute the same softmax.
BANNED_BIAS = -100.0

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Wanted = Literal["logprobs", "features"]


class Policy(nn.Module):
    """A causal network with the sampler's temperature and its ban on vision tokens built in."""

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
        """One door for all that runs the network: a wrapper that gathers sharded weights stands before it.

        `features` are the batch's own, where they are known already. With `candidates` (M, K), tokens for each answer
        place, it returns their logprobs (M, K) instead of the targets'.
        """
        if features is None:
            features = self.image_features(batch)
        if wanted == "features":
            return features
        states = self.predicting_states(batch, features)
        return self.logprobs(batch, states) if candidates is None else self.candidate_logprobs(states, candidates)

    def image_features(self, batch: MicroBatch) -> Tensor:
        """(image tokens, H) of all images."""
        self.encoded_images += len(batch.images.grids)
        packed = packs_images(batch.attention, batch.images.pixels.device)
        return self.family.image_features(self.network, batch.images, packed=packed)

    def predicting_states(self, batch: MicroBatch, features: Tensor) -> Tensor:
        """Hidden states (M, H) that predict the answer tokens."""
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
        """Logprobs (M,) and detached entropies (M,) of the answer tokens, in nats."""
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
        """Log probabilities (M, K) of a few tokens at each answer place, without gradient: for an audit."""
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
    """(V,) beside the output matrix `weight`: 0, and BANNED_BIAS for tokens that stand for pixels."""
    bias = torch.zeros(weight.shape[0], device=weight.device)
    bias[list(family.banned_token_ids)] = BANNED_BIAS
    return bias

"""The network as the learner uses it: logprobs of the answers in shared-prefix rows, as the sampler would give them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from othink_ray.core.logprobs import token_logprobs
from othink_ray.engines.micro_batch import MicroBatch
from othink_ray.families.base import Family

# What vLLM's logit_bias can do at most; a token at -100 nats is never sampled, and both sides compute the same softmax.
BANNED_BIAS = -100.0

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_LOGIT_ROWS = 1024  # rows of [*, vocabulary] logits that exist at a time


class Policy(nn.Module):
    """A causal network with the sampler's temperature and its ban on vision tokens built in."""

    def __init__(self, network: nn.Module, family: Family, temperature: float) -> None:
        super().__init__()
        self.network = network
        self.family = family
        self.temperature = temperature

    def forward(self, batch: MicroBatch, *, whole: bool = False) -> tuple[Tensor, Tensor] | Tensor:
        """Logprobs (N,) and detached entropies (N,) of the answer tokens, in nats; `whole`: see log_distributions."""
        if whole:
            return self.log_distributions(batch)
        weight = self.family.output_weight(self.network)
        return token_logprobs(
            self.predicting_states(batch),
            weight,
            batch.targets,
            temperature=self.temperature,
            logit_bias=logit_bias(self.family, weight),
            chunk=_LOGIT_ROWS,
        )

    def log_distributions(self, batch: MicroBatch) -> Tensor:
        """Log probabilities (N, V) of every token at every answer place: for a few rows, such as an audit's."""
        weight = self.family.output_weight(self.network)
        logits = self.predicting_states(batch).float() @ weight.float().T + logit_bias(self.family, weight)
        return torch.log_softmax(logits / self.temperature, dim=-1)

    def predicting_states(self, batch: MicroBatch) -> Tensor:
        """Hidden states (N, H) that predict the answer tokens."""
        hidden = self.family.hidden_states(
            self.network,
            token_ids=batch.token_ids,
            position_ids=batch.position_ids,
            mask=batch.mask,
            images=batch.images,
        )
        return hidden.flatten(0, 1)[batch.predictors]


def logit_bias(family: Family, weight: Tensor) -> Tensor:
    """(V,) beside the output matrix `weight`: 0, and BANNED_BIAS for tokens that stand for pixels."""
    bias = torch.zeros(weight.shape[0], device=weight.device)
    bias[list(family.banned_token_ids)] = BANNED_BIAS
    return bias

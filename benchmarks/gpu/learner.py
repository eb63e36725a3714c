"""Learner in plain torch with a run's policy, packed samples and loss, but without Ray and DeepSpeed.

AdamW updates the weights in their dtype; DeepSpeed would keep float32 copies of bfloat16 weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.work import BETA
from othink_ray.config.schema import ModelConfig
from othink_ray.core.attention import attention_for
from othink_ray.core.losses import LOSSES, LossInputs
from othink_ray.core.packing import pack
from othink_ray.engines.base import release_cache
from othink_ray.engines.collate import MicroBatch, collate
from othink_ray.engines.policy import DTYPES, Policy, checkpoint_layers, train_without_dropout
from othink_ray.families import open_family
from othink_ray.families.hugging_face import prune_last_layer
from othink_ray.types import Pack, Probe, ScoredGroup

LOGIT_ROWS = 1024
CLIP = (0.2, 0.2)
ATTENTIONS = ("flex", "dense")
# In FLOPs of a forward pass: forward 1, backward 2, and the reference's forward 1.
PASSES = 4


class PlainLearner:
    """Learner on one device in this process; each packed sample is a micro-batch."""

    def __init__(self, model: ModelConfig, device: torch.device, *, lr: float, shares_gpu: bool = False) -> None:
        assert model.path is not None
        self.shares_gpu = shares_gpu
        self.family, self.device = open_family(model, model.path), device
        self.policy, self.reference = (self._open(model) for _ in range(2))
        self.reference.requires_grad_(False).eval()
        train_without_dropout(self.policy.network)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=lr, fused=True)
        self.attention = ATTENTIONS[-1]

    def _open(self, model: ModelConfig) -> Policy:
        network = self.family.load_network(DTYPES[model.dtype])
        prune_last_layer(self.family.layers(network)[-1])
        return Policy(network, self.family, temperature=1.0, logit_rows=LOGIT_ROWS).to(self.device)

    def choose_attention(self, groups: Sequence[ScoredGroup]) -> None:
        """Select the fastest attention whose forward and backward pass work on this device."""
        for self.attention in ATTENTIONS:
            try:
                for sample in self.packs(groups):
                    self.policy(self.batch(sample))[0].sum().backward()
                return
            except Exception:  # a compiler or a kernel may raise anything; part "learn" reports it
                continue
            finally:
                self.reset()

    def packs(self, groups: Sequence[ScoredGroup]) -> list[Pack]:
        return [pack(group, group.rewards - group.rewards.mean(), len(groups)) for group in groups]

    def batch(self, sample: Pack) -> MicroBatch:
        return collate([sample], self.family, attention_for(self.attention, self.device), self.device)

    def set_checkpointing(self, enabled: bool) -> None:
        if enabled:
            checkpoint_layers(self.policy.network)
        else:
            self.policy.network.gradient_checkpointing_disable()  # type: ignore[operator]

    def update(self, batches: Sequence[MicroBatch]) -> None:
        """Run one optimizer step, with gradient accumulation over the micro-batches."""
        for batch in batches:
            with torch.no_grad():
                reference = self.reference(batch, candidates=batch.targets[:, None]).squeeze(1)
            policy_logprobs, _ = self.policy(batch)
            loss, _ = LOSSES["grpo"](
                LossInputs(
                    policy_logprobs=policy_logprobs,
                    old_logprobs=policy_logprobs.detach(),
                    ref_logprobs=reference,
                    advantages=batch.advantages,
                    loss_weights=batch.loss_weights,
                    answers=batch.answers,
                    beta=BETA,
                    clip_eps=CLIP,
                    estimator="k3",
                )
            )
            loss.backward()
        self.optimizer_step()
        self.release_memory()

    def release_memory(self) -> None:
        """Release cached GPU memory, as a run's learner does after an update and after a push."""
        if self.shares_gpu:
            release_cache(self.device)

    def optimizer_step(self) -> None:
        """Clip the gradients, step the optimizer and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def logprobs(self, batch: MicroBatch) -> Tensor:
        with torch.no_grad():
            logprobs: Tensor = self.policy(batch)[0]
        return logprobs

    def operations(self, samples: Sequence[Pack]) -> float:
        """Return the FLOPs of one update, counted as in benchmarks.limits: torch's matmuls, attention included."""
        selected, self.attention = self.attention, "blocks"
        try:
            with FlopCounterMode(display=False) as counter:
                for sample in samples:
                    self.logprobs(self.batch(sample))
        finally:
            self.attention = selected
        return float(PASSES * counter.get_total_flops())

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.policy.network.named_parameters()

    def candidate_logprobs(self, probes: Sequence[Probe]) -> list[NDArray[np.float32]]:
        """Return the policy's logprobs (T, K) of each probe's candidates."""
        logprobs = []
        for probe in probes:
            zeros = np.zeros(len(probe.group.completions))
            sample = pack(ScoredGroup(group=probe.group, rewards=zeros, parts={}, valid=zeros == 0), zeros, 1)
            candidates = torch.from_numpy(probe.candidates).to(self.device)
            with torch.no_grad():
                logprobs.append(self.policy(self.batch(sample), candidates=candidates).cpu().numpy())
        return logprobs

    def reset(self) -> None:
        """Drop gradients and cached memory that an out-of-memory step leaves, and reset the peak statistics."""
        self.optimizer.zero_grad()
        release_cache(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gb(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0

"""The learner's step in plain torch around the same policy, rows and loss: it needs neither Ray nor DeepSpeed.

AdamW works on the weights as they are; DeepSpeed would keep float32 copies of bfloat16 ones.
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
from othink_ray.core.losses import LOSSES
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
# Of what a forward pass computes: backward twice as much, and the reference's forward pass once more.
PASSES = 4


class PlainLearner:
    """One process, one device. A row is a micro-batch of its own."""

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
        """The quickest that goes forward and backward here."""
        for self.attention in ATTENTIONS:
            try:
                for row in self.rows(groups):
                    self.policy(self.batch(row))[0].sum().backward()
                return
            except Exception:  # whatever a compiler or a kernel may raise; part "learn" tells it
                continue
            finally:
                self.clear()

    def rows(self, groups: Sequence[ScoredGroup]) -> list[Pack]:
        return [pack(one, one.rewards - one.rewards.mean(), len(groups)) for one in groups]

    def batch(self, row: Pack) -> MicroBatch:
        return collate([row], self.family, attention_for(self.attention, self.device), self.device)

    def set_checkpointing(self, wanted: bool) -> None:
        if wanted:
            checkpoint_layers(self.policy.network)
        else:
            self.policy.network.gradient_checkpointing_disable()  # type: ignore[operator]

    def update(self, batches: Sequence[MicroBatch]) -> None:
        for batch in batches:
            with torch.no_grad():
                reference = self.reference(batch, candidates=batch.targets[:, None]).squeeze(1)
            found, _ = self.policy(batch)
            loss, _ = LOSSES["grpo"](
                found,
                found.detach(),
                reference,
                batch.advantages,
                batch.loss_weights,
                answers=batch.answers,
                beta=BETA,
                clip_eps=CLIP,
                estimator="k3",
            )
            loss.backward()
        self.descend()
        self.release_memory()

    def release_memory(self) -> None:
        """As a run's learner does after an update and after sending a push."""
        if self.shares_gpu:
            release_cache(self.device)

    def descend(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def logprobs(self, batch: MicroBatch) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.policy(batch)[0]
        return found

    def operations(self, rows: Sequence[Pack]) -> float:
        """Of one update, counted as `bench.limits` does: torch's own products, with attention among them."""
        used, self.attention = self.attention, "blocks"
        try:
            with FlopCounterMode(display=False) as counter:
                for row in rows:
                    self.logprobs(self.batch(row))
        finally:
            self.attention = used
        return float(PASSES * counter.get_total_flops())

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.policy.network.named_parameters()

    def candidate_logprobs(self, probes: Sequence[Probe]) -> list[NDArray[np.float32]]:
        """The policy's (T, K) of each probe's candidates."""
        found = []
        for probe in probes:
            nothing = np.zeros(len(probe.group.completions))
            row = pack(ScoredGroup(group=probe.group, rewards=nothing, parts={}, valid=nothing == 0), nothing, 1)
            candidates = torch.from_numpy(probe.candidates).to(self.device)
            with torch.no_grad():
                found.append(self.policy(self.batch(row), candidates=candidates).cpu().numpy())
        return found

    def clear(self) -> None:
        """After a step that found no memory: what it left is dropped, and the peak is counted anew."""
        self.optimizer.zero_grad()
        release_cache(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gb(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0

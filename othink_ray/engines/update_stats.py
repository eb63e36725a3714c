"""Statistics of one update: sums over the answer tokens of all micro-batches, reduced over ranks once at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from othink_ray.core.losses import LossTerms, RatioTerms
from othink_ray.engines.collate import MicroBatch
from othink_ray.types import Pack, UpdateStats


class UpdateTotals:
    """Accumulator of an update's statistics, on the learner's device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(16, dtype=torch.float64, device=device)
        self.maxima = torch.zeros(2, dtype=torch.float64, device=device)
        self.losses: list[tuple[list[str], Tensor]] = []

    def note(self, packs: Sequence[Pack], value: Tensor) -> None:
        """Record the loss of a micro-batch with its prompt ids, to name the prompts if it is not finite."""
        self.losses.append(([pack.prompt_id for pack in packs], value.detach()))

    def _bad_prompts(self) -> tuple[str, ...]:
        """Return the ids of the prompts in this rank's micro-batches whose loss is not finite."""
        return tuple(prompt for prompts, value in self.losses if not value.isfinite() for prompt in prompts)

    def add(
        self,
        batch: MicroBatch,
        value: Tensor,
        terms: LossTerms,
        ratios: RatioTerms,
        logprobs: Tensor,
        entropy: Tensor,
        referenced: bool,
    ) -> None:
        """Add one micro-batch; `logprobs` and `entropy` are (M,) in nats."""
        active = batch.loss_weights > 0
        gap = (logprobs.detach() - batch.sampler_logprobs)[active].double()
        ratio = gap.exp()
        self.sums += torch.stack(
            [
                value.detach().double(),
                terms.kl_sum.double(),
                ratio.sum(),
                terms.clipped.double(),
                entropy[active].double().sum(),
                gap.abs().sum(),
                active.sum().double(),
                gap.new_tensor(float(referenced)),
                ratios.used,
                ratios.truncated,
                ratios.cut.double(),
                ratios.masked.double(),
                ratios.sequence_raw,
                ratios.sequence_truncated,
                ratios.sequence_cut.double(),
                ratios.answers,
            ]
        )
        if len(gap):
            self.maxima = torch.maximum(self.maxima, torch.stack([ratio.max(), gap.abs().max()]))

    def stats(self, *, updates: int, grad_norm: float, lr: float, vision_encodes: int, skipped: int) -> UpdateStats:
        """Return the statistics reduced over ranks; the loss is the mean over `updates` optimizer steps."""
        sums = torch.cat([self.sums, self.sums.new_tensor([vision_encodes])])
        dist.all_reduce(sums)
        dist.all_reduce(self.maxima, op=dist.ReduceOp.MAX)
        loss, kl, ratio, clipped, entropy, gap, tokens, references, *importance, encodes = sums.tolist()
        used, truncated, cut, masked, sequence_raw, sequence_truncated, sequence_cut, answers = importance
        count, sequences = max(tokens, 1.0), max(answers, 1.0)
        return UpdateStats(
            loss=loss / updates,
            kl_mean=kl / count if references else float("nan"),
            ratio_raw_mean=ratio / count,
            ratio_raw_max=self.maxima[0].item(),
            ratio_clip_frac=clipped / count,
            ratio_used_mean=used / count,
            ratio_truncated_mean=truncated / count,
            ratio_truncated_frac=cut / count,
            ratio_masked_frac=masked / count,
            ratio_sequence_raw_mean=sequence_raw / sequences,
            ratio_sequence_truncated_mean=sequence_truncated / sequences,
            ratio_sequence_truncated_frac=sequence_cut / sequences,
            entropy=entropy / count,
            logp_gap_mean=gap / count,
            logp_gap_max=self.maxima[1].item(),
            grad_norm=grad_norm,
            lr=lr,
            tokens=int(tokens),
            vision_encodes=int(encodes),
            reference_passes=int(references),
            skipped=skipped,
            bad_prompts=() if math.isfinite(loss) else self._bad_prompts(),
        )

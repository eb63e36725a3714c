"""One DeepSpeed ZeRO rank: reference pass, loss, optimiser step, weights out. The only file that imports deepspeed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from othink_ray.config.schema import LearnerConfig
from othink_ray.core.losses import LOSSES, LossTerms
from othink_ray.core.packing import pack
from othink_ray.engines.base import Place, share_of_cores
from othink_ray.engines.micro_batch import MicroBatch, collate
from othink_ray.engines.policy import DTYPES, Policy
from othink_ray.families.base import Family
from othink_ray.types import Group, Pack, Probe, ScoredGroup, UpdateStats


class DeepSpeedLearner:
    """The learner's engine on one rank. All public methods are collective: every rank calls them together."""

    def __init__(
        self,
        learner: LearnerConfig,
        family: Family,
        *,
        dtype: str,
        temperature: float,
        clip_eps: tuple[float, float],
        kl_estimator: str,
        with_reference: bool,
        seed: int,
        place: Place,
    ) -> None:
        self.learner, self.family, self.place = learner, family, place
        self.clip_eps, self.kl_estimator = clip_eps, kl_estimator
        on_gpu = learner.gpus_per_rank > 0
        self.device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        os.environ.update(
            MASTER_ADDR=place.master_address,
            MASTER_PORT=str(place.master_port),
            RANK=str(place.rank),
            WORLD_SIZE=str(place.world_size),
            LOCAL_RANK="0",
            DS_ACCELERATOR="cuda" if on_gpu else "cpu",
        )
        if not on_gpu:
            torch.set_num_threads(share_of_cores(learner.threads, learner.world_size))
        import deepspeed  # reads DS_ACCELERATOR when it is first imported

        self.deepspeed = deepspeed
        # DeepSpeed would compile collectives of its own for CPU ranks, a minute at the first start; gloo has them all.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False)
        torch.manual_seed(seed)
        self.engine = self._initialise(Policy(family.load_network(DTYPES[dtype]), family, temperature), train=True)
        self.reference: Any = None
        if with_reference:
            frozen = Policy(family.load_network(DTYPES[dtype]), family, temperature).requires_grad_(False).eval()
            sharded = learner.zero_stage == 3
            self.reference = self._initialise(frozen, train=False) if sharded else frozen.to(self.device)

    def _initialise(self, policy: Policy, *, train: bool) -> Any:
        """Wrap in DeepSpeed's engine. The head's weight is read outside its own module, which ZeRO-3 must be told."""
        if train and self.learner.gradient_checkpointing:
            network: Any = policy.network
            network.gradient_checkpointing_enable({"use_reentrant": False})
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": self.learner.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": next(policy.parameters()).dtype == torch.bfloat16},
            "gradient_clipping": self.learner.max_grad_norm,
            "steps_per_print": 10**9,
        }
        if self.learner.zero_stage == 3:
            self.deepspeed.zero.register_external_parameter(policy, self.family.output_weight(policy.network))
        optimizer = None
        if train:
            optimizer = torch.optim.AdamW(policy.parameters(), **self._hyperparameters())
        engine, *_ = self.deepspeed.initialize(
            model=policy.to(self.device), config=settings, optimizer=optimizer, dist_init_required=False
        )
        return engine

    def _hyperparameters(self) -> dict[str, Any]:
        return {
            "lr": self.learner.lr,
            "betas": (self.learner.adam_beta1, self.learner.adam_beta2),
            "eps": self.learner.adam_eps,
            "weight_decay": self.learner.weight_decay,
        }

    def update(self, updates: Sequence[Sequence[Sequence[Pack]]], *, beta: float, lr: float, loss: str) -> UpdateStats:
        """One optimiser step for each of `updates`; gradients are summed over its micro-batches and all ranks."""
        micro_batches = [[collate(packs, self.family, self.device) for packs in update] for update in updates]
        several = len(updates) > 1
        old = [[self._no_grad(self.engine, batch) if several else None for batch in update] for update in micro_batches]
        totals = _Totals(self.device)
        grad_norm = 0.0
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        for update, old_of_update in zip(micro_batches, old, strict=True):
            for index, (batch, old_logprobs) in enumerate(zip(update, old_of_update, strict=True)):
                reference = self._no_grad(self.reference, batch) if beta > 0 and self.reference is not None else None
                self.engine.set_gradient_accumulation_boundary(index == len(update) - 1)
                logprobs, entropy = self.engine(batch)
                value, terms = LOSSES[loss](
                    logprobs,
                    logprobs.detach() if old_logprobs is None else old_logprobs,
                    reference,
                    batch.advantages,
                    batch.loss_weights,
                    answers=batch.answers,
                    beta=beta,
                    clip_eps=self.clip_eps,
                    estimator=self.kl_estimator,
                )
                # DeepSpeed averages gradients over ranks; the loss weights are shares of the whole step.
                self.engine.backward(value * self.place.world_size)
                totals.add(batch, value, terms, logprobs.detach(), entropy, reference is not None)
            self.engine.step()
            grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        return totals.stats(grad_norm=grad_norm, lr=lr)

    @staticmethod
    def _no_grad(policy: Any, batch: MicroBatch) -> Tensor:
        with torch.no_grad():
            logprobs: Tensor = policy(batch)[0]
        return logprobs

    def candidate_logprobs(self, probes: Sequence[Probe]) -> list[NDArray[np.float32]]:
        batch = collate([_row(probe.group) for probe in probes], self.family, self.device)
        with torch.no_grad():
            log_p = self.engine(batch, whole=True).cpu()
        results, start = [], 0
        for probe in probes:
            candidates = torch.from_numpy(probe.candidates)
            rows = log_p[start : start + len(candidates)]
            results.append(rows.gather(1, candidates).numpy())
            start += len(candidates)
        return results

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self._parameters(trained_only=True)

    def _parameters(self, *, trained_only: bool) -> Iterator[tuple[str, Tensor]]:
        policy: Any = self.engine.module
        for name, parameter in policy.network.named_parameters():
            if parameter.requires_grad or not trained_only:
                with self._whole([parameter]):
                    yield name, parameter.detach()

    def _whole(self, parameters: list[Tensor]) -> Any:
        """Under ZeRO-3 a parameter lives in pieces; inside this context it is whole on every rank."""
        return self.deepspeed.zero.GatheredParameters(parameters, enabled=self.learner.zero_stage == 3)

    def export(self, folder: Path) -> None:
        policy: Any = self.engine.module
        state = {name: weight.to("cpu", copy=True) for name, weight in self._parameters(trained_only=False)}
        if self.place.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.family.save(folder, policy.network, state)
        dist.barrier()

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="learner")

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag="learner")
        if path is None:
            raise ValueError(f"run.resume: {folder} holds no learner state; name a checkpoints/step_N folder")
        for group in self.engine.optimizer.param_groups:  # restored too; but what this run's config says holds
            group.update(self._hyperparameters())


def _row(group: Group) -> Pack:
    """A group as a row, for its logprobs alone."""
    nothing = np.zeros(len(group.completions))
    return pack(ScoredGroup(group=group, rewards=nothing, parts={}, valid=nothing == 0), nothing, 1)


class _Totals:
    """Sums over the answer tokens of all micro-batches, reduced over ranks once at the end."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(10, dtype=torch.float64, device=device)
        self.maxima = torch.zeros(2, dtype=torch.float64, device=device)

    def add(
        self, batch: MicroBatch, value: Tensor, terms: LossTerms, logprobs: Tensor, entropy: Tensor, referenced: bool
    ) -> None:
        active = batch.loss_weights > 0
        gap = (logprobs - batch.sampler_logprobs)[active].double()
        ratio = gap.exp()
        zero = gap.new_zeros(())
        self.sums += torch.stack(
            [
                value.detach().double(),
                terms.kl_sum.double(),
                ratio.sum(),
                terms.clipped.double(),
                entropy[active].double().sum(),
                gap.abs().sum(),
                active.sum().double(),
                zero + batch.encoded_images,
                zero + referenced,
                zero + 1,
            ]
        )
        if len(gap):
            self.maxima = torch.maximum(self.maxima, torch.stack([ratio.max(), gap.abs().max()]))

    def stats(self, *, grad_norm: float, lr: float) -> UpdateStats:
        dist.all_reduce(self.sums)
        dist.all_reduce(self.maxima, op=dist.ReduceOp.MAX)
        loss, kl, ratio, clipped, entropy, gap, tokens, encodes, references, _ = self.sums.tolist()
        count = max(tokens, 1.0)
        return UpdateStats(
            loss=loss,
            kl_mean=kl / count if references else float("nan"),
            ratio_raw_mean=ratio / count,
            ratio_raw_max=self.maxima[0].item(),
            ratio_clip_frac=clipped / count,
            entropy=entropy / count,
            logp_gap_mean=gap / count,
            logp_gap_max=self.maxima[1].item(),
            grad_norm=grad_norm,
            lr=lr,
            tokens=int(tokens),
            vision_encodes=int(encodes),
            reference_passes=int(references),
        )

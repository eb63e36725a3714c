"""One DeepSpeed ZeRO rank: reference pass, loss, optimizer step, weight export. The only module to import deepspeed."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from othink_ray.config.model_rules import ADAPTER_FOLDER
from othink_ray.config.schema import LearnerConfig
from othink_ray.core.attention import attention_for
from othink_ray.core.losses import LOSSES, LossInputs, importance_weights
from othink_ray.core.packing import pack
from othink_ray.cpu.kernels import onednn_available, onednn_matmul
from othink_ray.engines.base import RendezvousInfo, on_one_thread, release_cache, share_of_cores
from othink_ray.engines.collate import HostBatch, MicroBatch, collate_on_host, to_device
from othink_ray.engines.compiled import compile_layers
from othink_ray.engines.learner_checkpoint import CheckpointWriter, StoredState, ZeroState, replace_export
from othink_ray.engines.lora import WithoutAdapters, adapter_weights, write_adapter
from othink_ray.engines.policy import (
    DTYPES,
    Policy,
    checkpoint_layers,
    choose_trained,
    features_frozen,
    parameter_groups,
    plain_weights,
    train_without_dropout,
    trained_weights,
)
from othink_ray.engines.prefetch import (
    Precomputed,
    Prefetched,
    Prefetcher,
    PrefetchQueue,
    Prepared,
    pixel_digest,
    pixels_as,
)
from othink_ray.engines.update_stats import UpdateTotals
from othink_ray.engines.zero_settings import flattened_linear, zero_settings
from othink_ray.families.base import Family
from othink_ray.families.hugging_face import prune_last_layer
from othink_ray.tracing import span
from othink_ray.types import Group, Pack, PixelDigest, Probe, ScoredGroup, UpdateSettings, UpdateStats


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
        tis_bounds: tuple[float, float],
        with_reference: bool,
        seed: int,
        rendezvous: RendezvousInfo,
        shares_gpu: bool,
    ) -> None:
        """`shares_gpu`: rollout engines on this GPU sleep during updates, and need its memory when they wake up."""
        self.shares_gpu = shares_gpu
        self.learner, self.family, self.rendezvous = learner, family, rendezvous
        self.clip_eps, self.kl_estimator, self.tis_bounds = clip_eps, kl_estimator, tis_bounds
        on_gpu = learner.gpus_per_rank > 0
        self.device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        os.environ.update(
            RANK=str(rendezvous.rank),
            WORLD_SIZE=str(rendezvous.world_size),
            LOCAL_RANK="0",
            DS_ACCELERATOR="cuda" if on_gpu else "cpu",
        )
        self.by_onednn = not on_gpu and learner.onednn and onednn_available()
        if not on_gpu:
            torch.set_num_threads(share_of_cores(learner.threads, learner.world_size))
            self.matmul_override = onednn_matmul() if self.by_onednn else None
        import deepspeed  # reads DS_ACCELERATOR when it is first imported

        self.deepspeed = deepspeed
        # DeepSpeed would compile its own collectives for CPU ranks, a minute at the first start; gloo has them all.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        rendezvous.join(self.device)
        deepspeed.init_distributed()
        torch.manual_seed(seed)
        self.attend = attention_for(learner.attention, self.device)
        policy = self._open_policy(DTYPES[dtype], temperature)
        choose_trained(family, policy.network, learner)
        train_without_dropout(policy.network)
        if learner.gradient_checkpointing:
            checkpoint_layers(policy.network)
        self.features_shared = learner.share_features and features_frozen(family, policy.network)
        self.engine = self._initialize(policy, train=True)
        self.state = ZeroState(
            deepspeed,
            self.engine,
            self.engine.module.network,
            stage=learner.zero_stage,
            rank=rendezvous.rank,
            world_size=rendezvous.world_size,
        )
        self.reference = self._open_reference(DTYPES[dtype], temperature) if with_reference else None
        self.prefetch_reference = self._open_prefetch_reference(temperature)
        self.prefetcher = Prefetcher(self._prefetch)

    def _open_reference(self, dtype: torch.dtype, temperature: float) -> Any:
        """Return the policy as it was when training began: the network without its adapters, or a frozen copy."""
        if self.learner.lora.rank:
            return WithoutAdapters(self.engine)
        frozen = self._open_policy(dtype, temperature).requires_grad_(False).eval()
        sharded = self.learner.zero_stage == 3
        return self._initialize(frozen, train=False) if sharded else frozen.to(self.device)

    def _open_prefetch_reference(self, temperature: float) -> Policy | None:
        """Return the reference for the prefetch thread: the same network, with a separate count of encoded images.

        None where the thread would gain nothing (a GPU runs one stream; the ranks' threads already use all cores), or
        where every pass is a collective of all ranks.
        """
        cores_in_use = self.learner.world_size * torch.get_num_threads() >= (os.cpu_count() or 1)
        if not isinstance(self.reference, Policy) or self.device.type == "cuda" or cores_in_use:
            return None
        return Policy(self.reference.network, self.family, temperature, self.learner.logit_rows)

    def _open_policy(self, dtype: torch.dtype, temperature: float) -> Policy:
        network = self.family.load_network(dtype)
        if self.learner.prune_last_layer:
            prune_last_layer(self.family.layers(network)[-1])
        if self.learner.compile:
            compile_layers(self.family, network, by_onednn=self.by_onednn)
        return Policy(network, self.family, temperature, self.learner.logit_rows)

    def _initialize(self, policy: Policy, *, train: bool) -> Any:
        """Wrap `policy` in a DeepSpeed engine; ZeRO-3 must know that the head's weight is read outside its module."""
        settings = zero_settings(self.learner, next(policy.parameters()).dtype)
        if self.learner.zero_stage == 3:
            zero = self.deepspeed.runtime.zero  # it replaces torch's linear function with `zero3_linear_wrap`
            zero.partition_parameters.zero3_linear_wrap = flattened_linear(zero.linear.zero3_linear_wrap)
            self.deepspeed.zero.register_external_parameter(policy, self.family.output_weight(policy.network))
        optimizer = None
        if train:
            trained = parameter_groups(self.family, policy.network, self.learner)
            # Fused: one kernel, without the temporary as large as the weights that torch's default allocates on GPUs.
            optimizer = torch.optim.AdamW(trained, fused=True, **self._hyperparameters())
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

    def update(self, updates: Sequence[Sequence[Sequence[Pack]]], settings: UpdateSettings) -> UpdateStats:
        """Run one optimizer step per update; gradients are summed over its micro-batches and all ranks."""
        stats = self._update(updates, settings)
        self.release_memory()
        return stats

    def release_memory(self) -> None:
        if self.shares_gpu:
            release_cache(self.device)

    def _update(self, updates: Sequence[Sequence[Sequence[Pack]]], settings: UpdateSettings) -> UpdateStats:
        queue, wants_reference = self.prefetcher.take(), settings.beta > 0 and self.reference is not None
        precomputed: Iterator[Precomputed | None] = repeat(None)
        if len(updates) > 1:
            precomputed = iter([self._before_any_step(packs, queue) for packs in chain(*updates)])
        totals = UpdateTotals(self.device)
        grad_norms: list[float] = []
        skipped, encodes = 0, 0
        for group in self.engine.optimizer.param_groups:
            group["lr"] = settings.lr * group["lr_scale"]
        for update in updates:
            for index, packs in enumerate(update):
                with span("prepare"):
                    prepared = self._prepared(packs, queue, next(precomputed))
                batch, reference = prepared.batch, prepared.reference if wants_reference else None
                if wants_reference and reference is None:
                    reference = self._no_grad(self.reference, prepared)
                self.engine.set_gradient_accumulation_boundary(index == len(update) - 1)
                with span("forward", tokens=len(batch.token_ids)):
                    logprobs, entropy = self.engine(batch, features=prepared.features)
                before = logprobs.detach() if prepared.old is None else prepared.old
                used, ratios = importance_weights(
                    settings.tis,
                    before,
                    batch.sampler_logprobs,
                    batch.loss_weights,
                    batch.answers,
                    bounds=self.tis_bounds,
                )
                value, terms = LOSSES[settings.loss](
                    LossInputs(
                        policy_logprobs=logprobs,
                        old_logprobs=before,
                        ref_logprobs=reference,
                        advantages=batch.advantages * used,
                        loss_weights=batch.loss_weights,
                        answers=batch.answers,
                        beta=settings.beta,
                        clip_eps=self.clip_eps,
                        estimator=self.kl_estimator,
                    )
                )
                # DeepSpeed averages gradients over ranks, but the loss weights are shares of the whole step: a sum.
                with span("backward"):
                    self.engine.backward(value * self.rendezvous.world_size)
                encodes += prepared.encodes
                totals.note(prepared.packs, value)
                totals.add(batch, value, terms, ratios, logprobs, entropy, wants_reference)
            with span("optimizer step"):
                self.engine.step()
            if self.engine.optimizer.overflow:  # the gradient is not finite, and DeepSpeed skipped the step
                skipped += 1
            else:
                grad_norms.append(float(self.engine.get_global_grad_norm()))
        encodes += self._take_encodes()
        with span("sum over ranks"):
            return totals.stats(
                updates=len(updates),
                grad_norm=fmean(grad_norms) if grad_norms else math.inf,
                lr=settings.lr,
                vision_encodes=encodes,
                skipped=skipped,
            )

    def prefetch(self, updates: Sequence[Sequence[Sequence[Pack]]], settings: UpdateSettings) -> None:
        self.prefetcher.prefetch(updates, with_reference=settings.beta > 0)

    @span("prepare")
    def _before_any_step(self, packs: Sequence[Pack], queue: PrefetchQueue) -> Precomputed:
        """Return the logprobs before the first of several optimizer steps and what else is computed; keep no pixels."""
        prepared = self._prepared(packs, queue)
        old = self._no_grad(self.engine, prepared)
        return Precomputed(old=old, features=prepared.features, reference=prepared.reference, encodes=prepared.encodes)

    def _prepared(self, packs: Sequence[Pack], queue: PrefetchQueue, known: Precomputed | None = None) -> Prepared:
        """Return a micro-batch on the device, with `known` tensors of an earlier pass or else the prefetched ones."""
        found = queue.pop(packs) if known is None else None
        found = found or Prefetched(host_batch=self._collate_on_host(packs), precomputed=known or Precomputed())
        prepared = found.precomputed.with_batch(packs, self._to_device(found.host_batch))
        if self.features_shared and prepared.features is None:
            return replace(prepared, features=self._features(self.engine, prepared.batch))
        return prepared

    @span("prefetch")
    def _prefetch(self, packs: Sequence[Pack], with_reference: bool) -> Prefetched:
        """Prepare a micro-batch of the next update on the prefetch thread."""
        host_batch, policy = self._collate_on_host(packs), self.prefetch_reference
        if policy is None or not with_reference:
            return Prefetched(host_batch=host_batch, precomputed=Precomputed())
        prepared = Prepared(packs=packs, batch=self._to_device(host_batch))
        if self.features_shared:
            prepared = replace(prepared, features=self._features(policy, prepared.batch))
        reference = self._no_grad(policy, prepared)
        encodes, policy.encoded_images = policy.encoded_images, 0
        precomputed = Precomputed(features=prepared.features, reference=reference, encodes=encodes)
        return Prefetched(host_batch=host_batch, precomputed=precomputed)

    @on_one_thread()  # engines prepare the next prompts on the same cores
    def _collate_on_host(self, packs: Sequence[Pack]) -> HostBatch:
        return collate_on_host(packs, self.family)

    @on_one_thread()
    def _to_device(self, host_batch: HostBatch) -> MicroBatch:
        return to_device(host_batch, self.attend, self.device)

    @staticmethod
    def _features(policy: Any, batch: MicroBatch) -> Tensor:
        """Return image features of a frozen tower and projector, which policy, old policy and reference share."""
        with torch.no_grad():
            features: Tensor = policy(batch, wanted="features")
        return features

    @staticmethod
    @span("no-grad pass")
    def _no_grad(policy: Any, prepared: Prepared) -> Tensor:
        """Return logprobs (M,) of the answer tokens by the arithmetic of the training pass, without entropies."""
        batch = prepared.batch
        with torch.no_grad():
            logprobs: Tensor = policy(batch, features=prepared.features, candidates=batch.targets[:, None])
        return logprobs.squeeze(1)

    def _take_encodes(self) -> int:
        """Return the number of images that policy and reference encoded since the last call, and reset it."""
        policies: list[Policy] = [self.engine.module]
        if not (self.reference is None or isinstance(self.reference, WithoutAdapters)):
            policies.append(getattr(self.reference, "module", self.reference))
        encodes = sum(policy.encoded_images for policy in policies)
        for policy in policies:
            policy.encoded_images = 0
        return encodes

    @on_one_thread()
    def candidate_logprobs(self, probes: Sequence[Probe]) -> list[NDArray[np.float32]]:
        batch = self._to_device(self._collate_on_host([_packed_sample(probe.group) for probe in probes]))
        requested = torch.from_numpy(np.concatenate([probe.candidates for probe in probes]))
        dummies = len(batch.targets) - len(requested)  # tokens of the dummy sample that joins probes without an image
        candidates = torch.nn.functional.pad(requested, (0, 0, 0, dummies)).to(self.device)
        with torch.no_grad():
            found = self.engine(batch, candidates=candidates).cpu()
        self._take_encodes()
        del batch, candidates
        self.release_memory()
        lengths = [len(probe.candidates) for probe in probes]
        return [logprobs.numpy() for logprobs in found[: len(requested)].split(lengths)]

    def pixel_digests(self, probes: Sequence[Probe]) -> list[PixelDigest]:
        images = [self.family.encode_images(probe.group.prompt.images) for probe in probes]
        return [
            pixel_digest(pixels_as(self.family, encoded, probe.pixels.dtype))
            for encoded, probe in zip(images, probes, strict=True)
        ]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for weight in trained_weights(self.engine.module.network):
            with self._whole([weight.parameter]):
                yield weight.name, weight.pushed()

    def frozen_weights(self) -> Iterator[tuple[str, Tensor]]:
        if not self.learner.lora.rank:  # vLLM's loader cannot map the weights under an adapter
            for weight in plain_weights(self.engine.module.network):
                if not weight.base.requires_grad:
                    with self._whole(weight.parts):
                        yield weight.name, weight.merged()

    def _plain_weights(self) -> Iterator[tuple[str, Tensor]]:
        for weight in plain_weights(self.engine.module.network):
            with self._whole(weight.parts):
                yield weight.name, weight.merged()

    def _whole(self, parameters: list[Tensor]) -> Any:
        """Return a context in which these parameters are gathered on every rank; a no-op below ZeRO-3."""
        return self.deepspeed.zero.GatheredParameters(parameters, enabled=self.learner.zero_stage == 3)

    def export(self, folder: Path) -> None:
        """Write to a temporary folder and move it into place when complete: a failure leaves the earlier export."""
        network: Any = self.engine.module.network
        weights = ((name, weight.to("cpu", copy=True)) for name, weight in self._plain_weights())
        partial = folder / ".partial"
        if self.rendezvous.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.family.save(partial, network, weights)
        for _ in weights:  # the other ranks take part in ZeRO-3's gathers; rank 0 has consumed the iterator
            pass
        adapter = {}
        for name, factor in adapter_weights(network):
            with self._whole([factor]):
                adapter[name] = factor.detach().to("cpu", copy=True)
        if self.rendezvous.rank == 0:
            if adapter:
                write_adapter(partial / ADAPTER_FOLDER, network, adapter)
            replace_export(folder, partial)
        dist.barrier()

    def save(self, folder: Path) -> None:
        tensors, steps = self.state.shard()
        self.writer = CheckpointWriter(folder, self.rendezvous.rank, tensors, steps)

    def save_is_written(self) -> bool:
        return self.writer.done

    def finish_save(self) -> dict[str, str]:
        return self.writer.finish()

    def load(self, folder: Path) -> None:
        self.state.restore(StoredState(folder))


def _packed_sample(group: Group) -> Pack:
    """Pack an unscored group, for its logprobs only."""
    zeros = np.zeros(len(group.completions))
    return pack(ScoredGroup(group=group, rewards=zeros, parts={}, valid=zeros == 0), zeros, 1)

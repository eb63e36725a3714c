"""One DeepSpeed ZeRO rank: reference pass, loss, optimiser step, weights out. The only file that imports deepspeed."""

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
from othink_ray.core.losses import LOSSES, importance
from othink_ray.core.packing import pack
from othink_ray.engines.base import RendezvousInfo, on_one_thread, release_cache, share_of_cores
from othink_ray.engines.collate import LaidOut, MicroBatch, lay_out, to_device
from othink_ray.engines.compiled import compile_layers
from othink_ray.engines.learner_checkpoint import StoredState, Writing, ZeroState, replace_export
from othink_ray.engines.lora import (
    WithoutAdapters,
    adapter_weights,
    choose_trained,
    features_stay,
    parameter_groups,
    plain_weights,
    trained_weights,
    write_adapter,
)
from othink_ray.engines.policy import DTYPES, Policy, checkpoint_layers, train_without_dropout
from othink_ray.engines.prefetch import Kept, Made, Prefetched, Prefetcher, Prepared, pixel_digest, pixels_as
from othink_ray.engines.products import onednn_is_there, products_by_onednn
from othink_ray.engines.update_stats import Totals
from othink_ray.engines.zero_settings import linear_over_rows, zero_settings
from othink_ray.families.base import Family
from othink_ray.families.hugging_face import prune_last_layer
from othink_ray.tracing import span
from othink_ray.types import Group, Pack, PixelDigest, Probe, ScoredGroup, UpdateStats


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
        correction_bounds: tuple[float, float],
        with_reference: bool,
        seed: int,
        place: RendezvousInfo,
        shares_gpu: bool,
    ) -> None:
        """`shares_gpu`: engines sleep while this one works, and need its memory when they wake."""
        self.shares_gpu = shares_gpu
        self.learner, self.family, self.place = learner, family, place
        self.clip_eps, self.kl_estimator, self.correction_bounds = clip_eps, kl_estimator, correction_bounds
        on_gpu = learner.gpus_per_rank > 0
        self.device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        os.environ.update(
            RANK=str(place.rank),
            WORLD_SIZE=str(place.world_size),
            LOCAL_RANK="0",
            DS_ACCELERATOR="cuda" if on_gpu else "cpu",
        )
        self.by_onednn = not on_gpu and learner.onednn and onednn_is_there()
        if not on_gpu:
            torch.set_num_threads(share_of_cores(learner.threads, learner.world_size))
            self.products = products_by_onednn() if self.by_onednn else None
        import deepspeed  # reads DS_ACCELERATOR when it is first imported

        self.deepspeed = deepspeed
        # DeepSpeed would compile collectives of its own for CPU ranks, a minute at the first start; gloo has them all.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        place.rendezvous(self.device)
        deepspeed.init_distributed()
        torch.manual_seed(seed)
        self.attend = attention_for(learner.attention, self.device)
        policy = self._open_policy(DTYPES[dtype], temperature)
        choose_trained(family, policy.network, learner)
        train_without_dropout(policy.network)
        if learner.gradient_checkpointing:
            checkpoint_layers(policy.network)
        self.features_shared = learner.share_features and features_stay(family, policy.network)
        self.engine = self._initialise(policy, train=True)
        self.state = ZeroState(
            deepspeed,
            self.engine,
            self.engine.module.network,
            stage=learner.zero_stage,
            rank=place.rank,
            world_size=place.world_size,
        )
        self.reference = self._open_reference(DTYPES[dtype], temperature) if with_reference else None
        self.reference_beside = self._open_beside(temperature)
        self.ahead = Prefetcher(self._make_ahead)

    def _open_reference(self, dtype: torch.dtype, temperature: float) -> Any:
        """What the policy was when training began."""
        if self.learner.lora.rank:
            return WithoutAdapters(self.engine)
        frozen = self._open_policy(dtype, temperature).requires_grad_(False).eval()
        sharded = self.learner.zero_stage == 3
        return self._initialise(frozen, train=False) if sharded else frozen.to(self.device)

    def _open_beside(self, temperature: float) -> Policy | None:
        """The reference once more for a second thread, with a count of images of its own.

        None where that thread would gain nothing (a GPU has one queue, or the ranks' threads are on all cores already),
        or all ranks must make each pass together.
        """
        all_busy = self.learner.world_size * torch.get_num_threads() >= (os.cpu_count() or 1)
        if not isinstance(self.reference, Policy) or self.device.type == "cuda" or all_busy:
            return None
        return Policy(self.reference.network, self.family, temperature, self.learner.logit_rows)

    def _open_policy(self, dtype: torch.dtype, temperature: float) -> Policy:
        network = self.family.load_network(dtype)
        if self.learner.narrow_last_layer:
            prune_last_layer(self.family.layers(network)[-1])
        if self.learner.compile:
            compile_layers(self.family, network, by_onednn=self.by_onednn)
        return Policy(network, self.family, temperature, self.learner.logit_rows)

    def _initialise(self, policy: Policy, *, train: bool) -> Any:
        """Wrap in DeepSpeed's engine. The head's weight is read outside its own module, which ZeRO-3 must be told."""
        settings = zero_settings(self.learner, next(policy.parameters()).dtype)
        if self.learner.zero_stage == 3:
            zero = self.deepspeed.runtime.zero  # puts its own linear layers in the place of torch's
            zero.partition_parameters.zero3_linear_wrap = linear_over_rows(zero.linear.zero3_linear_wrap)
            self.deepspeed.zero.register_external_parameter(policy, self.family.output_weight(policy.network))
        optimizer = None
        if train:
            trained = parameter_groups(self.family, policy.network, self.learner)
            # Fused: one kernel, and no temporary as large as the weights, as torch's default on GPUs has.
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

    def update(
        self,
        updates: Sequence[Sequence[Sequence[Pack]]],
        *,
        beta: float,
        lr: float,
        loss: str,
        correction: str,
    ) -> UpdateStats:
        """One optimiser step for each of `updates`; gradients are summed over its micro-batches and all ranks."""
        stats = self._update(updates, beta=beta, lr=lr, loss=loss, correction=correction)
        self.release_memory()
        return stats

    def release_memory(self) -> None:
        if self.shares_gpu:
            release_cache(self.device)

    def _update(
        self, updates: Sequence[Sequence[Sequence[Pack]]], *, beta: float, lr: float, loss: str, correction: str
    ) -> UpdateStats:
        made, wants_reference = self.ahead.take(), beta > 0 and self.reference is not None
        kept: Iterator[Kept | None] = repeat(None)
        if len(updates) > 1:
            kept = iter([self._before_any_step(rows, made) for rows in chain(*updates)])
        totals = Totals(self.device)
        grad_norms: list[float] = []
        skipped, encodes = 0, 0
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for update in updates:
            for index, rows in enumerate(update):
                with span("prepare"):
                    one = self._prepared(rows, made, next(kept))
                batch, reference = one.batch, one.reference if wants_reference else None
                if wants_reference and reference is None:
                    reference = self._no_grad(self.reference, one)
                self.engine.set_gradient_accumulation_boundary(index == len(update) - 1)
                with span("forward", tokens=len(batch.token_ids)):
                    logprobs, entropy = self.engine(batch, features=one.features)
                before = logprobs.detach() if one.old is None else one.old
                used, ratios = importance(
                    correction,
                    before,
                    batch.sampler_logprobs,
                    batch.loss_weights,
                    batch.answers,
                    bounds=self.correction_bounds,
                )
                value, terms = LOSSES[loss](
                    logprobs,
                    before,
                    reference,
                    batch.advantages * used,
                    batch.loss_weights,
                    answers=batch.answers,
                    beta=beta,
                    clip_eps=self.clip_eps,
                    estimator=self.kl_estimator,
                )
                # DeepSpeed averages gradients over ranks; the loss weights are shares of the whole step.
                with span("backward"):
                    self.engine.backward(value * self.place.world_size)
                encodes += one.encodes
                totals.note(one.rows, value)
                totals.add(batch, value, terms, ratios, logprobs, entropy, wants_reference)
            with span("optimiser step"):
                self.engine.step()
            if self.engine.optimizer.overflow:  # DeepSpeed steps on no gradient that is not finite
                skipped += 1
            else:
                grad_norms.append(float(self.engine.get_global_grad_norm()))
        encodes += self._take_encodes()
        with span("sum over ranks"):
            return totals.stats(
                updates=len(updates),
                grad_norm=fmean(grad_norms) if grad_norms else math.inf,
                lr=lr,
                vision_encodes=encodes,
                skipped=skipped,
            )

    def prepare(self, updates: Sequence[Sequence[Sequence[Pack]]], *, with_reference: bool) -> None:
        self.ahead.prepare(updates, with_reference=with_reference)

    @span("prepare")
    def _before_any_step(self, rows: Sequence[Pack], made: Made) -> Kept:
        """Logprobs of the policy before the first of several optimizer steps. Pixels are not kept until its own."""
        one = self._prepared(rows, made)
        old = self._no_grad(self.engine, one)
        return Kept(old=old, features=one.features, reference=one.reference, encodes=one.encodes)

    def _prepared(self, rows: Sequence[Pack], made: Made, kept: Kept | None = None) -> Prepared:
        own = made.of(rows) if kept is None else None
        own = own or Prefetched(laid_out=self._lay_out(rows), kept=kept or Kept())
        one = own.kept.with_batch(rows, self._to_device(own.laid_out))
        if self.features_shared and one.features is None:
            return replace(one, features=self._features(self.engine, one.batch))
        return one

    @span("prepare ahead")
    def _make_ahead(self, rows: Sequence[Pack], with_reference: bool) -> Prefetched:
        laid_out, beside = self._lay_out(rows), self.reference_beside
        if beside is None or not with_reference:
            return Prefetched(laid_out=laid_out, kept=Kept())
        one = Prepared(rows=rows, batch=self._to_device(laid_out))
        if self.features_shared:
            one = replace(one, features=self._features(beside, one.batch))
        reference = self._no_grad(beside, one)
        encodes, beside.encoded_images = beside.encoded_images, 0
        return Prefetched(laid_out=laid_out, kept=Kept(features=one.features, reference=reference, encodes=encodes))

    @on_one_thread()
    def _lay_out(self, packs: Sequence[Pack]) -> LaidOut:
        """On one thread: engines prepare what comes next meanwhile."""
        return lay_out(packs, self.family)

    @on_one_thread()
    def _to_device(self, laid_out: LaidOut) -> MicroBatch:
        return to_device(laid_out, self.attend, self.device)

    @staticmethod
    def _features(policy: Any, batch: MicroBatch) -> Tensor:
        """The images as a tower and a projector that stay see them: the same for policy, old policy and reference."""
        with torch.no_grad():
            features: Tensor = policy(batch, wanted="features")
        return features

    @staticmethod
    @span("pass without gradient")
    def _no_grad(policy: Any, one: Prepared) -> Tensor:
        """Logprobs (M,) of the answer tokens, by the same arithmetic as with a gradient; entropies are not computed."""
        with torch.no_grad():
            logprobs: Tensor = policy(one.batch, features=one.features, candidates=one.batch.targets[:, None])
        return logprobs.squeeze(1)

    def _take_encodes(self) -> int:
        """How many images went through a vision tower since the last call."""
        policies: list[Policy] = [self.engine.module]
        if not (self.reference is None or isinstance(self.reference, WithoutAdapters)):
            policies.append(getattr(self.reference, "module", self.reference))
        encodes = sum(policy.encoded_images for policy in policies)
        for policy in policies:
            policy.encoded_images = 0
        return encodes

    @on_one_thread()
    def candidate_logprobs(self, probes: Sequence[Probe]) -> list[NDArray[np.float32]]:
        batch = self._to_device(self._lay_out([_row(probe.group) for probe in probes]))
        asked = torch.from_numpy(np.concatenate([probe.candidates for probe in probes]))
        unasked = len(batch.targets) - len(asked)  # of the row that joins probes without an image
        candidates = torch.nn.functional.pad(asked, (0, 0, 0, unasked)).to(self.device)
        with torch.no_grad():
            found = self.engine(batch, candidates=candidates).cpu()
        self._take_encodes()
        del batch, candidates
        self.release_memory()
        lengths = [len(probe.candidates) for probe in probes]
        return [own.numpy() for own in found[: len(asked)].split(lengths)]

    def pixel_digests(self, probes: Sequence[Probe]) -> list[PixelDigest]:
        images = [self.family.encode_images(probe.group.prompt.images) for probe in probes]
        return [
            pixel_digest(pixels_as(self.family, own, probe.pixels.dtype))
            for own, probe in zip(images, probes, strict=True)
        ]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for weight in trained_weights(self.engine.module.network):
            with self._whole([weight.parameter]):
                yield weight.name, weight.pushed()

    def frozen_weights(self) -> Iterator[tuple[str, Tensor]]:
        if not self.learner.lora.rank:  # vLLM's loader cannot say where the weights under an adapter lie
            for weight in plain_weights(self.engine.module.network):
                if not weight.base.requires_grad:
                    with self._whole(weight.parts):
                        yield weight.name, weight.merged()

    def _plain_weights(self) -> Iterator[tuple[str, Tensor]]:
        for weight in plain_weights(self.engine.module.network):
            with self._whole(weight.parts):
                yield weight.name, weight.merged()

    def _whole(self, parameters: list[Tensor]) -> Any:
        """Under ZeRO-3 a parameter lives in pieces; inside this context it is whole on every rank."""
        return self.deepspeed.zero.GatheredParameters(parameters, enabled=self.learner.zero_stage == 3)

    def export(self, folder: Path) -> None:
        """Write the model aside and put it in place when it is complete: what breaks off leaves an earlier export."""
        network: Any = self.engine.module.network
        weights = ((name, weight.to("cpu", copy=True)) for name, weight in self._plain_weights())
        aside = folder / ".partial"
        if self.place.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            self.family.save(aside, network, weights)
        for _ in weights:  # a gathering under ZeRO-3 takes all ranks; only the first one keeps what is gathered
            pass
        adapter = {}
        for name, factor in adapter_weights(network):
            with self._whole([factor]):
                adapter[name] = factor.detach().to("cpu", copy=True)
        if self.place.rank == 0:
            if adapter:
                write_adapter(aside / ADAPTER_FOLDER, network, adapter)
            replace_export(folder, aside)
        dist.barrier()

    def save(self, folder: Path) -> None:
        tensors, steps = self.state.share()
        self.writing = Writing(folder, self.place.rank, tensors, steps)

    def written(self) -> bool:
        return self.writing.over

    def saved(self) -> dict[str, str]:
        return self.writing.finish()

    def load(self, folder: Path) -> None:
        self.state.restore(StoredState(folder))


def _row(group: Group) -> Pack:
    """A group as a row, for its logprobs alone."""
    nothing = np.zeros(len(group.completions))
    return pack(ScoredGroup(group=group, rewards=nothing, parts={}, valid=nothing == 0), nothing, 1)

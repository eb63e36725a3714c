"""Compare a vLLM engine after pushes through the layer-wise reload of NCCL and IPC with plain loading.

Runs in a separate process: a process can have only one engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from othink_ray.config.schema import ModelConfig, RolloutConfig
from othink_ray.engines.base import RendezvousInfo, Sampling
from othink_ray.types import Prompt
from tests.gpu import fake_device

BUCKET = 20_000  # bytes: query, key and value of one layer come in different buckets
SAMPLING = Sampling(answers=1, max_tokens=4, temperature=1.0, seed=0)
Named = Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded:
    """Differences from an engine that loaded the same weights plainly; all should be empty."""

    weights: list[str]
    buffers: list[str]  # including tensors in lists of modules
    moved: list[str]  # weights at another address: captured CUDA graphs would read the old one
    logprobs: float  # largest difference in nats
    buckets: int
    memory: list[str]  # calls of vLLM's allocator, and loaded buckets


class Local:
    """An engine in this process, with the interface that vLLM's sender calls."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.buckets = 0
        self.log: list[str] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.engine.transfer("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self.buckets = 0
        self.engine.transfer("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.buckets += 1
        self.log.append("load")
        self.engine.transfer("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.engine.transfer("finish_weight_update")


class Comparison:
    """One engine, and two sets of learner weights: those of the model folder, and others."""

    def __init__(self, model: ModelConfig, rollout: RolloutConfig, path: str, handles: str) -> None:
        from othink_ray.engines.policy import DTYPES
        from othink_ray.engines.vllm_rollout import VLLMRollout
        from othink_ray.families import open_family
        from tests.engines.samples import worker_of

        class Engine(VLLMRollout):
            @staticmethod
            def arguments(*inputs: Any, **named: Any) -> dict[str, Any]:
                return fake_device.with_transfer(VLLMRollout.arguments(*inputs, **named), "ipc")

        os.environ[fake_device.FOLDER] = handles
        family = open_family(model, path)
        self.engine = Engine(rollout, model, family, path, transport="ipc", max_logprobs=20)
        self.worker = worker_of(self.engine)
        self.network = self.worker.network
        old = dict(family.load_network(DTYPES[model.dtype]).named_parameters())
        generator = torch.Generator().manual_seed(1)
        self.old = {name: weight.detach() for name, weight in old.items()}
        self.new = {
            name: (weight + 0.1 * torch.randn(weight.shape, generator=generator).to(weight.dtype))
            for name, weight in self.old.items()
        }
        self.engines = Local(self.engine)
        self.engines.log = self.worker.sleep_mode_backend.calls
        self.version = 0

    def plain(self, weights: dict[str, Tensor]) -> None:
        """Push `weights` by the plain path, which CPU engines always use."""
        self.version += 1
        self.engine.begin_push()
        self.engine.load_weights(weights.items())
        self.engine.finish_push(self.version, 1)

    def send(self, named: Named) -> None:
        """Push weights by vLLM's weight transfer."""
        from othink_ray.engines.vllm_transfer import open_sender

        self.version += 1
        rendezvous = RendezvousInfo(rank=0, world_size=1, master_address="127.0.0.1", master_port=1)
        open_sender("ipc", named, self.engines, rendezvous, port=0, receivers=1, bucket_bytes=BUCKET).send_weights()
        self.engine.finish_push(self.version, 0)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
        named = dict(self.network.named_parameters())
        buffers = dict(self.network.named_buffers()) | fake_device.plain_tensors(self.network)
        return (
            {name: weight.detach().clone() for name, weight in named.items()},
            {name: buffer.clone() for name, buffer in buffers.items()},
            {name: weight.data_ptr() for name, weight in named.items()},
        )

    def compare(self, prompts: Sequence[Prompt], names: Sequence[str], *, asleep_at: int | None) -> Reloaded:
        """Push the weights of `names` over the old ones by both paths, and compare the engine's state."""
        pushed = {name: self.new[name] for name in names}
        self.plain(self.old)
        self.plain(pushed)
        weights, buffers, addresses = self.state()
        wanted = self.engine.probe(prompts, SAMPLING, 8)
        self.plain(self.old)
        self.engines.log.clear()
        if asleep_at is not None:
            self.engine.sleep_level = asleep_at
            self.engine.sleep()
        self.send(lambda: iter(pushed.items()))
        now, now_buffers, now_addresses = self.state()
        probes = self.engine.probe(prompts, SAMPLING, 8)
        return Reloaded(
            weights=[name for name in weights if not torch.equal(weights[name], now[name])],
            buffers=[name for name in buffers if not torch.equal(buffers[name], now_buffers[name])],
            moved=[name for name in addresses if addresses[name] != now_addresses[name]],
            logprobs=max(
                float(abs(one.logprobs - other.logprobs).max()) for one, other in zip(wanted, probes, strict=True)
            ),
            buckets=self.engines.buckets,
            memory=[call for call, _ in groupby(self.engines.log)],
        )

    def errors_asleep(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the errors of a sleeping engine that is asked for answers."""
        self.plain(self.old)
        self.engine.sleep()
        errors = _errors(
            lambda: list(self.engine.generate(prompts, SAMPLING)), lambda: self.engine.probe(prompts, SAMPLING, 8)
        )
        self.plain(self.old)
        return errors

    def errors_after_failure(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the errors of a push during which the learner fails, and of the engine after it."""

        def half() -> Iterator[tuple[str, Tensor]]:
            for number, item in enumerate(self.new.items()):
                if described and number > len(self.new) // 2:
                    raise OSError("the learner is lost")
                yield item
            described.append(True)

        described: list[bool] = []  # the sender's first pass reads only names and shapes
        return _errors(
            lambda: self.send(half),
            lambda: list(self.engine.generate(prompts, SAMPLING)),
            lambda: self.engine.probe(prompts, SAMPLING, 8),
        )


def _errors(*calls: Callable[[], object]) -> list[str]:
    errors = []
    for call in calls:
        try:
            call()
            errors.append("nothing")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def run(
    model: ModelConfig, rollout: RolloutConfig, path: str, handles: str, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Push all weights, or only the text network's, to an engine that is awake or sleeping at some level."""
    torch.set_num_threads(1)
    Path(handles).mkdir(exist_ok=True)
    with fake_device.device():
        comparison = Comparison(model, rollout, path, handles)
        every = list(comparison.new)
        text = [name for name in every if "language_model" in name or name.startswith("lm_head")]
        return {
            "all": comparison.compare(prompts, every, asleep_at=None),
            "all after level 2": comparison.compare(prompts, every, asleep_at=2),
            "text": comparison.compare(prompts, text, asleep_at=None),
            "text after level 1": comparison.compare(prompts, text, asleep_at=1),
            "text after level 2": comparison.compare(prompts, text, asleep_at=2),
            "asleep": comparison.errors_asleep(prompts),
            "after failure": comparison.errors_after_failure(prompts),
        }

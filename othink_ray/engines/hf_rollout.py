"""Rollout engine on plain transformers: slow, and the oracle for the vLLM engine's tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from othink_ray.config.schema import ModelConfig, RolloutConfig
from othink_ray.engines.base import Receiver, Sampling, ServedAdapters, require_room, share_of_cores
from othink_ray.engines.lora import add_adapters
from othink_ray.engines.policy import DTYPES, logit_bias, trained_weights
from othink_ray.engines.prefetch import Inputs, pixel_digest
from othink_ray.families.base import Family, ImageTensors
from othink_ray.types import Completion, Group, Probe, Prompt
from othink_ray.weights import ShardDigest, TensorDigest, WorkerDigests, digests

HFInput = tuple[list[int], ImageTensors, Tensor]


class HFRollout(Receiver):
    """Samples one prompt at a time: prefills it once, then decodes its answers as one batch."""

    def __init__(
        self, rollout: RolloutConfig, model: ModelConfig, family: Family, adapters: ServedAdapters | None = None
    ) -> None:
        """Load the model; with `adapters`, a push carries only the LoRA factors, and other weights stay."""
        self.family = family
        self.max_model_len, self.fixed_length = rollout.max_model_len, rollout.fixed_length
        self.device = torch.device("cuda" if rollout.gpus_per_actor > 0 else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(share_of_cores(rollout.threads, rollout.num_actors))
        self.network: Any = family.load_network(DTYPES[model.dtype])
        self.pushed: dict[str, Tensor] = dict(self.network.named_parameters(remove_duplicate=False))
        if adapters is not None:
            add_adapters(self.network, adapters.rank, adapters.rank, adapters.layers)  # scale 1: B is pushed scaled
            self.pushed = {weight.name: weight.parameter for weight in trained_weights(self.network)}
        self.network.to(self.device).eval()
        self.bias = logit_bias(family, family.output_weight(self.network)).cpu()
        self.upcoming = Inputs(self._input)

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        self.upcoming.prefetch(prompts)

    def sleep(self) -> None:
        """Do nothing: the engine holds no memory but its weights, which stay."""

    def _write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        with torch.no_grad():
            for name, weight in weights:
                self.pushed[name].copy_(weight)

    def _drop_caches(self) -> None:
        """Do nothing: no cache outlives a prompt."""

    def _held_weights(self, expected: Mapping[str, TensorDigest], complete: bool) -> Sequence[WorkerDigests]:
        held = self.pushed
        found = digests((name, held[name].to(weight.dtype)) for name, weight in expected.items() if name in held)
        shards = {name: ShardDigest(value=digest.value, elements=held[name].numel()) for name, digest in found.items()}
        # A tied matrix has several names, and the learner sends it under the first.
        first = {id(weight): name for name, weight in reversed(held.items())}
        unreached = [name for name in first.values() if name not in expected] if complete else []
        return [
            WorkerDigests(shards=shards, faults=dict.fromkeys(unreached, "is not reached by any weight of the learner"))
        ]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        self._require_whole()
        for prompt in prompts:
            yield self._answer(prompt, self.upcoming.take(prompt), sampling)[0]

    def probe(self, prompts: Sequence[Prompt], sampling: Sampling, candidates: int) -> list[Probe]:
        self._require_whole()
        probes = []
        for prompt in prompts:
            inputs = self._input(prompt)
            group, log_p = self._answer(prompt, inputs, sampling)
            likeliest = log_p[: len(group.completions[0].token_ids), 0].topk(candidates)
            probes.append(
                Probe(
                    group=group,
                    candidates=likeliest.indices.numpy(),
                    logprobs=likeliest.values.float().numpy(),
                    pixels=pixel_digest(inputs[1].pixels),
                )
            )
        return probes

    @torch.no_grad()
    def _answer(self, prompt: Prompt, inputs: HFInput, sampling: Sampling) -> tuple[Group, Tensor]:
        """Sample one group; return it with the log distributions (T, G, V) it was sampled from."""
        prompt_ids, images, positions = inputs
        generator = torch.Generator().manual_seed(sampling.seed_of(prompt))
        cache = DynamicCache(config=self.network.config.get_text_config())
        token_ids = torch.tensor([prompt_ids], device=self.device)
        position_ids = positions[:, None].to(self.device)
        pixels: dict[str, Tensor] = {}
        if prompt.images:
            pixels = {name: tensor.to(self.device) for name, tensor in self.family.image_inputs(images).items()}
        answers: list[Tensor] = []
        distributions: list[Tensor] = []
        room = min(sampling.max_tokens, self.max_model_len - len(prompt_ids))
        ended = torch.zeros(sampling.answers, dtype=torch.bool)
        for index in range(room):
            output = self.network(
                input_ids=token_ids,
                position_ids=position_ids.squeeze(0),  # networks with one axis take (B, T), without an axis dimension
                past_key_values=cache,
                use_cache=True,
                **pixels,
            )
            logits = output.logits[:, -1].float().cpu()
            if index == 0:
                cache.batch_repeat_interleave(sampling.answers)
                logits = logits.expand(sampling.answers, -1)
                pixels = {}
            logits = logits + self.bias
            log_p = torch.log_softmax(logits / (sampling.temperature or 1.0), dim=-1)
            greedy = sampling.temperature == 0
            chosen = log_p.argmax(-1) if greedy else torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
            distributions.append(log_p)
            answers.append(chosen)
            ended |= self._ends(chosen)
            if bool(ended.all()):
                break
            token_ids = chosen[:, None].to(self.device)
            position_ids = (positions.max() + 1 + index).expand(len(positions), sampling.answers, 1).to(self.device)
        return self._group(prompt, prompt_ids, torch.stack(answers), torch.stack(distributions))

    def _input(self, prompt: Prompt) -> HFInput:
        """Return the expanded prompt, its pixels and its positions."""
        images = self.family.encode_images(prompt.images)
        counts = self.family.image_token_counts(prompt.images)
        prompt_ids = self.family.expand(self.family.prompt_token_ids(prompt), counts)
        require_room(prompt, prompt_ids, self.max_model_len)
        return prompt_ids, images, self.family.prompt_positions(torch.tensor(prompt_ids), images)

    def _ends(self, token_ids: Tensor) -> Tensor:
        """Return a mask of end tokens, all False with rollout.fixed_length."""
        return (token_ids == self.family.eos_token_id) & (not self.fixed_length)

    def _group(self, prompt: Prompt, prompt_ids: list[int], answers: Tensor, log_p: Tensor) -> tuple[Group, Tensor]:
        """Cut each of the answers (T, G) after its end token; return the group and `log_p` as it is."""
        chosen = log_p.gather(-1, answers[..., None])[..., 0]
        completions = []
        for column in range(answers.shape[1]):
            ids = answers[:, column].numpy()
            ends = np.flatnonzero(self._ends(answers[:, column]).numpy())
            length = int(ends[0]) + 1 if len(ends) else len(ids)
            completions.append(
                Completion(
                    token_ids=ids[:length].astype(np.int64),
                    sampler_logprobs=chosen[:length, column].numpy().astype(np.float32),
                    text=self.family.answer_texts([ids[:length].tolist()])[0],
                    finish="stop" if len(ends) else "length",
                )
            )
        group = Group(
            prompt=prompt,
            prompt_token_ids=np.array(prompt_ids, dtype=np.int64),
            completions=tuple(completions),
            version=self.version,
            image_encodes=len(prompt.images),
        )
        return group, log_p

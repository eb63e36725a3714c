"""Sampling with vLLM, in process, one engine per actor. Only file of the rollout side that imports vllm."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from othink_ray.config.schema import ModelConfig, RolloutConfig
from othink_ray.engines.base import Sampling, require_room, share_of_cores
from othink_ray.engines.policy import BANNED_BIAS
from othink_ray.families.base import Family
from othink_ray.types import Completion, Group, Probe, Prompt


class VLLMRollout:
    """A vLLM engine that is given compressed images and unexpanded prompts, and gives back what it really saw."""

    def __init__(
        self,
        rollout: RolloutConfig,
        model: ModelConfig,
        family: Family,
        path: str,
        *,
        transport: str,
        max_logprobs: int,
    ) -> None:
        self.family = family
        self.version = -1
        self.limit = rollout.max_model_len
        on_gpu = rollout.gpus_per_actor > 0
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_NO_USAGE_STATS="1",
            VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        )
        if not on_gpu:
            os.environ.update(
                VLLM_CPU_KVCACHE_SPACE=str(max(1, round(rollout.kv_cache_gb))),
                VLLM_CPU_OMP_THREADS_BIND="nobind",
                OMP_NUM_THREADS=str(share_of_cores(rollout.threads, rollout.num_actors)),
            )
        from vllm import SamplingParams
        from vllm.engine.arg_utils import EngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.llm_engine import LLMEngine

        self._sampling_params = SamplingParams
        self._final_only = RequestOutputKind.FINAL_ONLY
        arguments: dict[str, Any] = {
            "model": path,
            "dtype": model.dtype,
            "seed": 0,  # every request brings its own
            "max_model_len": rollout.max_model_len,
            "max_num_seqs": rollout.max_num_seqs,
            "max_num_batched_tokens": max(8192, rollout.max_model_len),
            "limit_mm_per_prompt": {"image": rollout.max_images, "video": 0},
            "mm_processor_kwargs": {"min_pixels": model.min_pixels, "max_pixels": model.max_pixels},
            "max_logprobs": max_logprobs,
            "logprobs_mode": "processed_logprobs",  # after the ban and the temperature: the learner's distribution
            "enable_prefix_caching": True,
            "enforce_eager": rollout.enforce_eager,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
            "trust_remote_code": False,
        }
        if on_gpu:
            arguments["gpu_memory_utilization"] = rollout.gpu_memory_utilization
            if transport in ("nccl", "ipc"):
                arguments["weight_transfer_config"] = {"backend": transport}
        else:
            # A seeded request that is prefilled in parts crashes vLLM's CPU sampler; whole prefills only.
            # Its attention takes blocks of 32: shorter ones let shorter prompts be shared by a group.
            arguments |= {"enable_chunked_prefill": False, "block_size": 32, "skip_mm_profiling": True}
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments), enable_multiprocessing=False)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        for index, output in self._outputs(prompts, sampling, logprobs=0):
            yield self._group(prompts[index], output)

    def probe(self, prompts: Sequence[Prompt], sampling: Sampling, candidates: int) -> list[Probe]:
        outputs = dict(self._outputs(prompts, sampling, logprobs=candidates))
        return [self._probe(prompt, outputs[index], candidates) for index, prompt in enumerate(prompts)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.engine.collective_rpc(lambda worker: worker.model_runner.reload_weights(weights_iterator=iter(weights)))
        self.adopt(version)

    def transfer(self, verb: str, *arguments: Any) -> None:
        """One call of vLLM's own weight transfer, made by the learner's sender."""
        self.engine.collective_rpc(verb, args=arguments)

    def adopt(self, version: int) -> None:
        """The weights that were transferred are whole now."""
        self.forget()
        self.version = version

    def forget(self) -> None:
        """Drop keys, values and image features of older weights; with any of them left, answers mix two policies."""
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM refused to drop its prefix cache: requests were still running during a push")
        self.engine.reset_encoder_cache()
        self.engine.reset_mm_cache()

    def _outputs(self, prompts: Sequence[Prompt], sampling: Sampling, *, logprobs: int) -> Iterator[tuple[int, Any]]:
        """(index of a prompt, its output) as they finish; named by index, since a prompt may come twice."""
        requests = [self._request(prompt) for prompt in prompts]  # what can be refused is refused before anything runs
        waiting = {str(index) for index in range(len(prompts))}
        try:
            for index, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
                self.engine.add_request(str(index), request, self._parameters(prompt, sampling, logprobs))
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    waiting.remove(output.request_id)
                    yield int(output.request_id), output
        finally:
            self.engine.abort_request(list(waiting))  # of a caller that stopped listening
        assert not waiting, f"vLLM answered all but {sorted(waiting)}"

    def _parameters(self, prompt: Prompt, sampling: Sampling, logprobs: int) -> Any:
        return self._sampling_params(
            n=sampling.answers,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed_of(prompt),
            logprobs=logprobs,
            logit_bias=dict.fromkeys(self.family.banned_token_ids, BANNED_BIAS),
            detokenize=False,
            output_kind=self._final_only,
        )

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        token_ids = self.family.prompt_token_ids(prompt)
        require_room(prompt, self.family.expand(token_ids, self.family.image_token_counts(prompt.images)), self.limit)
        images = [Image.open(io.BytesIO(image)).convert("RGB") for image in prompt.images]
        return {"prompt_token_ids": token_ids} | ({"multi_modal_data": {"image": images}} if images else {})

    def _group(self, prompt: Prompt, output: Any) -> Group:
        answers = sorted(output.outputs, key=lambda answer: answer.index)
        texts = self.family.decode([answer.token_ids for answer in answers])
        completions = tuple(
            Completion(
                token_ids=np.array(answer.token_ids, dtype=np.int64),
                sampler_logprobs=np.array(
                    [place[token].logprob for place, token in zip(answer.logprobs, answer.token_ids, strict=True)],
                    dtype=np.float32,
                ),
                text=text,
                finish="length" if answer.finish_reason == "length" else "stop",
            )
            for answer, text in zip(answers, texts, strict=True)
        )
        return Group(
            prompt=prompt,
            prompt_token_ids=np.array(output.prompt_token_ids, dtype=np.int64),
            completions=completions,
            version=self.version,
        )

    def _probe(self, prompt: Prompt, output: Any, candidates: int) -> Probe:
        [answer] = output.outputs
        likeliest = [
            sorted(place.items(), key=lambda item: (item[1].rank, item[0]))[:candidates] for place in answer.logprobs
        ]
        return Probe(
            group=self._group(prompt, output),
            candidates=np.array([[token for token, _ in place] for place in likeliest], dtype=np.int64),
            logprobs=np.array([[item.logprob for _, item in place] for place in likeliest], dtype=np.float32),
        )

"""Rollout engine on vLLM, in process, one per actor."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from othink_ray.config.schema import ModelConfig, RolloutConfig
from othink_ray.data.prompts import decode_image
from othink_ray.engines.base import (
    Receiver,
    Sampling,
    ServedAdapters,
    UnfinishedPush,
    on_one_thread,
    require_room,
    share_of_cores,
)
from othink_ray.engines.policy import BANNED_BIAS
from othink_ray.engines.prefetch import Inputs, pixel_digest
from othink_ray.families.base import Family
from othink_ray.types import Completion, Group, PixelDigest, Probe, Prompt
from othink_ray.weights import TensorDigest, WorkerDigests

_ADAPTER = 1  # vLLM's id of the only adapter


class VLLMRollout(Receiver):
    """A vLLM engine: takes compressed images and unexpanded prompts, and returns the token ids that it processed."""

    def __init__(
        self,
        rollout: RolloutConfig,
        model: ModelConfig,
        family: Family,
        path: str,
        *,
        transport: str,
        max_logprobs: int,
        sleep_level: int = 1,
        adapters: ServedAdapters | None = None,
    ) -> None:
        """Open an engine on the model folder or hub name `path`.

        `sleep_level` 2 drops the weights during sleep: only where every push brings all of them. With `adapters`,
        pushes bring their factors, and all other weights keep the values of the model folder.
        """
        self.family, self.sleep_level, self.adapters = family, sleep_level, adapters
        self.limit, self.prefix_caching = rollout.max_model_len, rollout.prefix_caching
        self.fixed_length = rollout.fixed_length
        on_gpu = rollout.gpus_per_actor > 0
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_NO_USAGE_STATS="1",
            VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        )
        if not on_gpu:
            threads = share_of_cores(rollout.threads, rollout.num_actors * rollout.tensor_parallel)
            os.environ.update(
                VLLM_CPU_KVCACHE_SPACE=str(rollout.kv_cache_gb),
                VLLM_CPU_OMP_THREADS_BIND="nobind",
                OMP_NUM_THREADS=str(threads),
                VLLM_CPU_ATTN_SPLIT_KV="0"
                if model.dtype != "float32"
                else "1",  # one summation order, as the learner's
            )
            torch.set_num_threads(threads)  # OpenMP has read its environment already, in which Ray sets one thread
        from vllm import SamplingParams
        from vllm.engine.arg_utils import EngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.llm_engine import LLMEngine

        self._sampling_params = SamplingParams
        self._final_only, self._lora_request = RequestOutputKind.FINAL_ONLY, LoRARequest
        arguments = self.arguments(
            rollout, model, family, path, transport=transport, max_logprobs=max_logprobs, adapters=adapters
        )
        if not on_gpu:
            _inspect_here(path)
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments), enable_multiprocessing=False)
        self.engine.collective_rpc("open_network")
        self.adapter: Any = None  # vLLM's LoRARequest, sent with every request after the first push
        self.asleep = False
        self.upcoming, self.probed = Inputs(self._input), Inputs(self._input)

    @staticmethod
    def arguments(
        rollout: RolloutConfig,
        model: ModelConfig,
        family: Family,
        path: str,
        *,
        transport: str,
        max_logprobs: int,
        adapters: ServedAdapters | None = None,
    ) -> dict[str, Any]:
        """Return keyword arguments of vLLM's `EngineArgs`, without opening an engine or touching a device."""
        arguments: dict[str, Any] = {
            "model": path,
            "dtype": model.dtype,
            "seed": 0,  # every request has its own seed
            "max_model_len": rollout.max_model_len,
            "max_num_seqs": rollout.max_num_seqs,
            "max_num_batched_tokens": max(8192, rollout.max_model_len),
            "limit_mm_per_prompt": {"image": rollout.max_images, "video": 0},
            "mm_processor_kwargs": family.processor_settings,
            "mm_processor_cache_gb": 0,  # it would hold gigabytes of pixels of images that are not used again
            "max_logprobs": max_logprobs,
            "logprobs_mode": "processed_logprobs",  # after the ban and the temperature: the learner's distribution
            "enable_prefix_caching": True,
            "enforce_eager": rollout.enforce_eager,
            "tensor_parallel_size": rollout.tensor_parallel,
            # A vision tower is small, and its head count is rarely divisible by the tensor-parallel size.
            "mm_encoder_tp_mode": "weights" if rollout.tensor_parallel == 1 else "data",
            "distributed_executor_backend": "uni" if rollout.tensor_parallel == 1 else "mp",
            "worker_extension_cls": "othink_ray.engines.vllm_worker.WorkerExtension",
            "disable_log_stats": True,
            "trust_remote_code": False,
            "load_format": "safetensors",  # other weight formats can run code when they are loaded
        }
        if model.dtype != "float32":
            from othink_ray.engines.vllm_patches import rounding_arguments

            arguments |= rounding_arguments()
        if adapters is not None:
            arguments |= _serving(adapters, path)
        if rollout.gpus_per_actor > 0:
            arguments["gpu_memory_utilization"] = rollout.gpu_memory_utilization
            arguments["enable_sleep_mode"] = rollout.sleep
            if transport in ("nccl", "ipc"):
                arguments["weight_transfer_config"] = {"backend": transport}
        else:
            # No chunked prefill: with seeded requests it crashes vLLM's CPU sampler. Blocks of 32, the smallest that
            # its CPU attention takes: small blocks let a group share more of a short prompt.
            arguments |= {"enable_chunked_prefill": False, "block_size": 32, "skip_mm_profiling": True}
            if model.dtype == "float32" and rollout.enforce_eager:
                from othink_ray.engines.vllm_patches import kernel_arguments

                arguments |= kernel_arguments()
        return arguments

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        self.upcoming.prefetch(prompts)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        self._require_whole()
        encodes = self._images_encoded()
        inputs = [self.upcoming.take(prompt) for prompt in prompts]  # invalid prompts raise before any request runs
        for index, output in self._outputs(prompts, inputs, sampling, logprobs=0):
            before, encodes = encodes, self._images_encoded()
            yield self._group(prompts[index], output, encodes - before)

    def probe(self, prompts: Sequence[Prompt], sampling: Sampling, candidates: int) -> list[Probe]:
        """Sample one answer per prompt with its likeliest tokens; the inputs of repeated probes stay cached."""
        self._require_whole()
        self.probed.prefetch(prompts)
        inputs = [self.probed.get(prompt) for prompt in prompts]
        with on_one_thread():  # more threads only add synchronization to so small a batch
            outputs = dict(self._outputs(prompts, inputs, sampling, logprobs=candidates))
        return [self._probe(prompt, inputs[index], outputs[index]) for index, prompt in enumerate(prompts)]

    def transfer(self, verb: str, *arguments: Any) -> None:
        """Run one method of vLLM's weight transfer in the workers, on behalf of the learner's sender."""
        if verb == "start_weight_update":
            self.begin_push()
        self.engine.collective_rpc(verb, args=arguments)

    def sleep(self) -> None:
        """Free the device for the learner until the next push: drop the KV cache and, at level 2, the weights.

        At level 1 the weights move to host memory. vLLM keeps the buffers that it derives from the configuration (such
        as rotary tables) at both levels, but drops an adapter's buffers at level 2.
        """
        self.engine.sleep(level=self.sleep_level)
        self.asleep = True

    def _require_whole(self) -> None:
        super()._require_whole()
        if self.asleep:
            raise UnfinishedPush("this engine is asleep: the learner has its GPU memory until the next push")

    def begin_push(self) -> None:
        super().begin_push()
        if self.asleep:
            self.engine.wake_up(["weights"])
            self.engine.collective_rpc("clear_image_features")

    def _write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        verb = "write_weights" if self.adapters is None else "write_factors"
        self.engine.collective_rpc(verb, args=(list(weights),))

    def _held_weights(self, expected: Mapping[str, TensorDigest], complete: bool) -> Sequence[WorkerDigests]:
        held: list[WorkerDigests] = self.engine.collective_rpc(
            "held_weights", args=(dict(expected), self.version, complete)
        )
        return held

    def _images_encoded(self) -> int:
        encoded: int = self.engine.collective_rpc("images_encoded")[0]
        return encoded

    def _drop_caches(self) -> None:
        """Drop the prefix cache and image features of older weights: with any left, answers would mix two policies."""
        if self.adapters is not None and self._arrived:
            self.engine.collective_rpc("serve_adapter", args=(_ADAPTER,))
            self.adapter = self._lora_request(lora_name="policy", lora_int_id=_ADAPTER, lora_path="pushed")
        if self.asleep:
            self.engine.wake_up(["kv_cache"])
            self.asleep = False
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests were still running during a push")
        self.engine.reset_encoder_cache()

    def _outputs(
        self, prompts: Sequence[Prompt], inputs: Sequence[Any], sampling: Sampling, *, logprobs: int
    ) -> Iterator[tuple[int, Any]]:
        """Yield (prompt index, output) as requests finish; the request id is the index, since a prompt may repeat."""
        pending = {str(index) for index in range(len(prompts))}
        try:
            for index, (prompt, engine_input) in enumerate(zip(prompts, inputs, strict=True)):
                self.engine.add_request(
                    str(index), engine_input, self._parameters(prompt, sampling, logprobs), lora_request=self.adapter
                )
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    pending.remove(output.request_id)
                    yield int(output.request_id), output
        finally:
            self.engine.abort_request(list(pending))  # the caller closed this iterator early
        assert not pending, f"vLLM finished without an output for requests {sorted(pending)}"

    def _parameters(self, prompt: Prompt, sampling: Sampling, logprobs: int) -> Any:
        return self._sampling_params(
            n=sampling.answers,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            ignore_eos=self.fixed_length,
            seed=sampling.seed_of(prompt),
            logprobs=logprobs,
            logit_bias=dict.fromkeys(self.family.banned_token_ids, BANNED_BIAS),
            flat_logprobs=True,
            skip_reading_prefix_cache=not self.prefix_caching,
            detokenize=False,
            output_kind=self._final_only,
        )

    def _input(self, prompt: Prompt) -> Any:
        """Return vLLM's engine input: expanded tokens, processed pixels."""
        token_ids = self.family.prompt_token_ids(prompt)
        require_room(prompt, self.family.expand(token_ids, self.family.image_token_counts(prompt.images)), self.limit)
        images = [decode_image(image) for image in prompt.images]
        request = {"prompt_token_ids": token_ids} | ({"multi_modal_data": {"image": images}} if images else {})
        return self.engine.renderer.render_cmpl([request])[0]

    def _group(self, prompt: Prompt, output: Any, image_encodes: int) -> Group:
        answers = sorted(output.outputs, key=lambda answer: answer.index)
        texts = self.family.answer_texts([answer.token_ids for answer in answers])
        completions = tuple(
            Completion(
                token_ids=np.array(answer.token_ids, dtype=np.int64),
                sampler_logprobs=_by_position(answer.logprobs.logprobs, answer)[:, 0].astype(np.float32),
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
            image_encodes=image_encodes,
        )

    def _probe(self, prompt: Prompt, engine_input: Any, output: Any) -> Probe:
        [answer] = output.outputs
        return Probe(
            group=self._group(prompt, output, image_encodes=0),
            candidates=_by_position(answer.logprobs.token_ids, answer)[:, 1:].astype(np.int64),
            logprobs=_by_position(answer.logprobs.logprobs, answer)[:, 1:].astype(np.float32),
            pixels=_pixels(engine_input),
        )


def _pixels(engine_input: Any) -> PixelDigest:
    """Return the digest of the images that go to vLLM's vision tower."""
    found = [
        field.data
        for image in engine_input.get("mm_kwargs", {}).get("image", ())
        for name, field in image.items()
        if name.startswith("pixel_values")
    ]
    return pixel_digest(torch.cat(found)) if found else PixelDigest()


def _by_position(values: Sequence[float], answer: Any) -> NDArray[Any]:
    """Return vLLM's flat list as (T, 1 + K): at each position the sampled token, then the K likeliest tokens."""
    return np.array(values).reshape(len(answer.token_ids), -1)


def _serving(adapters: ServedAdapters, path: str) -> dict[str, Any]:
    """Return vLLM's arguments for one adapter, in the dtype of the model, on exactly these layers."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.config.lora import MaxLoRARanks

    [architecture] = AutoConfig.from_pretrained(path, trust_remote_code=False).architectures
    rename = ModelRegistry.models[architecture].load_model_cls().hf_to_vllm_mapper.get_rename_mapper()
    layers = {_fused(rename._map_name(layer)) for layer in adapters.layers}
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= adapters.rank),  # padded with zeros
        "lora_target_modules": sorted(layers),
        "enable_tower_connector_lora": not all(layer.startswith("language_model.") for layer in layers),
    }


_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)


def _fused(layer: str) -> str:
    """Return the path of the vLLM layer that contains this layer."""
    owner, _, name = layer.rpartition(".")
    return f"{owner}.{_FUSED.get(name, name)}"


def _inspect_here(path: str) -> None:
    """Let vLLM inspect the model class in this process: its subprocess would import torchvision unprepared."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    for architecture in ModelRegistry.models.keys() & AutoConfig.from_pretrained(path).architectures:
        ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())

"""Work that vLLM does once per group: encoding its images and prefilling its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from othink_ray.engines.base import Sampling, ServedAdapters
from othink_ray.engines.policy import Policy
from othink_ray.engines.vllm_rollout import VLLMRollout, _serving
from othink_ray.types import Prompt
from tests.engines.samples import ask, give, picture, sent_weights

SAMPLING = Sampling(answers=4, max_tokens=3, temperature=1.0, seed=0)
BLOCK = 32  # tokens per block of vLLM's prefix cache


@dataclass
class Work:
    """Counter on vLLM's modules: images that entered the vision tower, tokens that entered the first layer."""

    images: int = 0
    tokens: int = 0
    handles: list[Any] = field(default_factory=list)

    def watch(self, worker: Any) -> None:
        network = worker.model_runner.model
        self.handles = [
            network.visual.register_forward_hook(self._count_images, with_kwargs=True),
            network.language_model.model.layers[0].register_forward_hook(self._count_tokens),
        ]

    def _count_images(self, _module: Any, inputs: Any, named: dict[str, Any], _output: Any) -> None:
        self.images += len(named["grid_thw"])

    def _count_tokens(self, _module: Any, inputs: Any, _output: Any) -> None:
        self.tokens += len(inputs[1])

    def take(self) -> tuple[int, int]:
        counted = (self.images, self.tokens)
        self.images = self.tokens = 0
        return counted


@pytest.fixture
def engine(vllm_engine: VLLMRollout, policy: Policy) -> VLLMRollout:
    give(vllm_engine, sent_weights(policy.network), 0)
    return vllm_engine


@pytest.fixture
def work(engine: VLLMRollout) -> Iterator[Work]:
    counted = Work()
    engine.engine.collective_rpc(counted.watch)
    yield counted
    for handle in counted.handles:
        handle.remove()


def test_an_image_is_encoded_once_per_weights_version(
    engine: VLLMRollout, work: Work, policy: Policy, scenes: Sequence[Prompt]
) -> None:
    for version in (1, 2):
        groups = list(engine.generate(scenes[:6], SAMPLING))
        assert work.take()[0] == sum(group.image_encodes for group in groups) == 6
        give(engine, sent_weights(policy.network), version)


def test_images_of_one_prompt_are_each_encoded_once(engine: VLLMRollout, work: Work) -> None:
    list(engine.generate([ask("two", picture(84, 84, 0), picture(56, 84, 1))], SAMPLING))
    assert work.take()[0] == 2


def test_answers_of_a_group_share_the_blocks_of_their_prompt(
    engine: VLLMRollout, work: Work, scenes: Sequence[Prompt]
) -> None:
    [group] = engine.generate(scenes[:1], SAMPLING)
    length = len(group.prompt_token_ids)
    shared = (length - 1) // BLOCK * BLOCK
    fed_back = sum(len(completion.token_ids) - 1 for completion in group.completions)
    assert shared > 0
    assert work.take()[1] == length + (SAMPLING.answers - 1) * (length - shared) + fed_back


def test_prefix_caching_saves_work_and_keeps_the_answers(
    engine: VLLMRollout, work: Work, scenes: Sequence[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, tokens = [], []
    for caching in (True, False):
        monkeypatch.setattr(engine, "prefix_caching", caching)
        groups = list(engine.generate(scenes, SAMPLING))
        found.append({group.prompt.id: [c.token_ids.tolist() for c in group.completions] for group in groups})
        tokens.append(work.take()[1])
    assert found[0] == found[1]
    assert tokens[1] > 1.5 * tokens[0]


def test_a_push_drops_the_prefix_cache(
    engine: VLLMRollout, work: Work, policy: Policy, scenes: Sequence[Prompt]
) -> None:
    once = SAMPLING.answers * (SAMPLING.max_tokens - 1)
    list(engine.generate(scenes[:1], SAMPLING))
    first = work.take()[1]
    list(engine.generate(scenes[:1], SAMPLING))
    kept = work.take()[1]
    give(engine, sent_weights(policy.network), 1)
    list(engine.generate(scenes[:1], SAMPLING))
    assert work.take()[1] == first > kept >= once


def test_a_push_during_generation_is_refused(engine: VLLMRollout) -> None:
    running = engine.engine
    running.add_request("left", {"prompt_token_ids": [1, 2, 3]}, engine._sampling_params(max_tokens=9, min_tokens=9))
    running.step()
    with pytest.raises(RuntimeError, match="requests were still running during a push"):
        engine._drop_caches()
    running.abort_request(["left"])
    engine._drop_caches()


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (8, 8), (9, 16), (100, 128)])
def test_adapters_are_padded_to_the_next_rank_of_vllm(engine: VLLMRollout, rank: int, served: int) -> None:
    adapters = ServedAdapters(rank=rank, layers=("model.language_model.layers.0.self_attn.q_proj",))
    assert _serving(adapters, engine.engine.vllm_config.model_config.model)["max_lora_rank"] == served


def test_the_next_push_wakes_a_sleeping_engine(engine: VLLMRollout, policy: Policy, taught: Policy) -> None:
    """On a CPU no memory is released, but the scheduler is paused as on a GPU."""
    give(engine, sent_weights(policy.network), 0)
    engine.sleep()
    assert engine.engine.is_sleeping()
    give(engine, sent_weights(taught.network), 1)
    assert not engine.engine.is_sleeping()
    [group] = engine.generate([ask("q", picture(56, 56, seed=0))], SAMPLING)
    assert group.version == 1

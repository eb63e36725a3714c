"""Pushes through vLLM's layer-wise reload, used by NCCL and IPC, against plain loading; and sleep around them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from othink_ray.config.load import load
from othink_ray.config.schema import Config
from othink_ray.engines.policy import trains_all
from tests.engines.samples import ask, picture
from tests.families.checkpoints import build_checkpoint
from tests.gpu.reload_comparison import Reloaded, run

pytestmark = pytest.mark.slow

CASES = [
    ("qwen2_vl", "float32"),
    ("qwen2_5_vl", "bfloat16"),
    ("qwen3_vl", "bfloat16"),
    ("internvl", "bfloat16"),
]
ASLEEP = ["resume ['weights']", "load", "resume ['kv_cache']"]


@pytest.fixture(scope="module")
def outcomes(
    config: Config, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[Any]]]:
    """Run one engine per case, each in a separate process."""
    prompts = [ask("a", picture(84, 84, 0)), ask("b", picture(56, 140, 1))]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        futures = {}
        for family, dtype in CASES:
            folder: Path = tmp_path_factory.mktemp("reloading")
            build_checkpoint(family, folder / "model", texts)
            model = replace(config.model, family=family, path=str(folder / "model"), dtype=dtype, tiny=None)
            futures[family, dtype] = processes.submit(
                run, model, config.rollout, str(folder / "model"), str(folder / "handles"), prompts
            )
        yield futures


@pytest.fixture(params=CASES, ids="-".join)
def found(request: pytest.FixtureRequest, outcomes: dict[tuple[str, str], Future[Any]]) -> dict[str, Any]:
    result: dict[str, Any] = outcomes[request.param].result(timeout=250)
    return result


def test_a_reload_leaves_the_bits_and_addresses_of_a_plain_load(found: dict[str, Any]) -> None:
    """Buckets separate query, key and value of a layer; all weights are pushed, then only the text network's."""
    for what in ("all", "text"):
        reloaded: Reloaded = found[what]
        assert (reloaded.weights, reloaded.buffers, reloaded.moved, reloaded.logprobs) == ([], [], [], 0.0)
        assert reloaded.buckets > 5
        assert reloaded.memory == ["load"]


def test_a_push_of_all_restores_weights_lost_in_sleep(found: dict[str, Any]) -> None:
    """Every weight, buffer and listed tensor was NaN in sleep: any that is not restored would still be."""
    reloaded: Reloaded = found["all after level 2"]
    assert reloaded.memory == ["suspend at level 2", *ASLEEP]
    assert (reloaded.weights, reloaded.buffers, reloaded.moved, reloaded.logprobs) == ([], [], [], 0.0)


def test_frozen_weights_survive_level_1_and_not_level_2(found: dict[str, Any]) -> None:
    kept, lost = found["text after level 1"], found["text after level 2"]
    assert kept.memory == ["suspend at level 1", *ASLEEP]
    assert (kept.weights, kept.buffers, kept.moved, kept.logprobs) == ([], [], [], 0.0)
    assert lost.weights and lost.buffers == []


def test_a_sleeping_engine_refuses_to_generate(found: dict[str, Any]) -> None:
    assert (
        found["asleep"]
        == ["UnfinishedPush: this engine is asleep: the learner has its GPU memory until the next push"] * 2
    )


def test_an_engine_with_half_a_transfer_refuses_to_generate(found: dict[str, Any]) -> None:
    failed, *refused = found["after failure"]
    assert failed == "OSError: the learner is lost"
    assert refused == [
        "UnfinishedPush: a push of weights did not finish: this engine holds parts of two policies"
    ] * len(refused)
    assert len(refused) == 2


@pytest.mark.parametrize(
    ("settings", "level"),
    [((), 2), (("learner.freeze=vision",), 1), (("learner.freeze=projector",), 1), (("learner.lora.rank=8",), 1)],
)
def test_sleep_drops_weights_only_where_all_are_pushed(
    settings: tuple[str, ...], level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from othink_ray.driver import build
    from othink_ray.engines import vllm_rollout

    opened: dict[str, Any] = {}
    monkeypatch.setattr(vllm_rollout, "VLLMRollout", lambda *_, **named: opened.update(named))
    monkeypatch.setattr("othink_ray.families.open_family", lambda *_: None)
    config = load(["cluster=one_gpu", *settings])
    build._vllm_engine(config, "anywhere", None)
    assert opened["sleep_level"] == level
    assert trains_all(config.learner) == (level == 2)

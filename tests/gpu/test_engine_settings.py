"""vLLM's resolved settings for our engine's arguments on GPUs, for every `conf/cluster` file with GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from othink_ray.config.load import conf_dir, load

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted(file.stem for file in (conf_dir() / "cluster").glob("*.yaml") if file.stem != "local")
SPLIT = ("cluster=one_node", "rollout.num_actors=2", "rollout.tensor_parallel=2", "rollout.gpus_per_actor=2")
EAGER = ("cluster=one_node", "rollout.enforce_eager=true")
SHARED = ("one_gpu", "one_node_colocated")
MODEL = ("model=qwen2_vl_2b", "data=geoqa")


@pytest.fixture(scope="module")
def resolved(model_folder: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Resolve all settings in one process, whose platform is faked at its start."""
    requested = [*((f"cluster={name}",) for name in CLUSTERS), SPLIT, EAGER]
    program = subprocess.run(
        [sys.executable, "-m", "tests.gpu.engine_settings", str(model_folder)],
        input=json.dumps([[*settings, *MODEL] for settings in requested]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        check=False,
    )
    resolved_settings = [
        json.loads(line.partition(" ")[2]) for line in program.stdout.splitlines() if line.startswith("RESOLVED ")
    ]
    assert len(resolved_settings) == len(requested), program.stderr[-3000:]
    return dict(zip(requested, resolved_settings, strict=True))


@pytest.mark.parametrize("name", CLUSTERS)
def test_vllm_resolves_the_engine_of_each_cluster_as_meant(
    name: str, resolved: dict[tuple[str, ...], dict[str, Any]]
) -> None:
    found, config = resolved[(f"cluster={name}",)], load([f"cluster={name}", *MODEL])
    assert found == {
        "runner 2": True,
        "worker": "vllm.v1.worker.gpu_worker.Worker",
        "extension": "othink_ray.engines.vllm_worker.WorkerExtension",
        "processes": 1,
        "executor": "uni",
        "dtype": "torch.bfloat16",
        "logprobs": "processed_logprobs",
        "tower": "weights",
        "sleeps": name in SHARED,
        "eager": False,
        "graphs": "FULL_AND_PIECEWISE",
        "largest graph": 512,
        "async": True,
        "chunked": True,
        "length": config.rollout.max_model_len,
        "side by side": config.rollout.max_num_seqs,
        "memory": config.rollout.gpu_memory_utilization,
        "prefix caching": True,
        "transfer": "ipc" if name in SHARED else "nccl",
    }


def test_a_split_engine_has_a_full_tower_in_each_process(
    resolved: dict[tuple[str, ...], dict[str, Any]],
) -> None:
    found = resolved[SPLIT]
    assert (found["processes"], found["executor"], found["tower"], found["transfer"]) == (2, "mp", "data", "nccl")
    assert (found["async"], found["chunked"], found["graphs"]) == (True, True, "FULL_AND_PIECEWISE")


def test_an_eager_engine_captures_no_graphs(resolved: dict[tuple[str, ...], dict[str, Any]]) -> None:
    assert (resolved[EAGER]["eager"], resolved[EAGER]["graphs"]) == (True, "NONE")

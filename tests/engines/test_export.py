"""Exports: over an earlier export, after a failure, and the collective gathers of all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from othink_ray.engines import deepspeed_learner
from othink_ray.engines.deepspeed_learner import DeepSpeedLearner
from othink_ray.engines.learner_checkpoint import replace_export
from othink_ray.engines.lora import add_adapters
from othink_ray.families import hugging_face
from othink_ray.families.base import Family

SPLIT_BYTES, UNSPLIT_BYTES = 100_000, 2**30


@pytest.fixture
def network(small_family: Family) -> nn.Module:
    return small_family.load_network(torch.float32)


@pytest.fixture
def gathered() -> list[list[Tensor]]:
    return []


@pytest.fixture
def export(small_family: Family, gathered: list[list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs one rank's part of an export with weight files of `shard_bytes`."""
    monkeypatch.setattr(deepspeed_learner.dist, "barrier", lambda: None)

    def exported(network: nn.Module, folder: Path, shard_bytes: int = UNSPLIT_BYTES, rank: int = 0) -> None:
        monkeypatch.setattr(hugging_face, "SHARD_BYTES", shard_bytes)
        learner: Any = DeepSpeedLearner.__new__(DeepSpeedLearner)
        learner.engine = SimpleNamespace(module=SimpleNamespace(network=network))
        learner.family, learner.rendezvous = small_family, SimpleNamespace(rank=rank)
        learner._whole = lambda parameters: gathered.append(parameters) or nullcontext()
        learner.export(folder)

    return exported


def weights_in(folder: Path, family: Family) -> dict[str, Tensor]:
    network: Any = type(family.load_network(torch.float32)).from_pretrained(folder, dtype=torch.float32)
    return dict(network.named_parameters())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize(
    ("earlier", "later"), [(SPLIT_BYTES, UNSPLIT_BYTES), (UNSPLIT_BYTES, SPLIT_BYTES), (SPLIT_BYTES, 3 * SPLIT_BYTES)]
)
def test_an_export_removes_the_earlier_one(
    earlier: int, later: int, network: nn.Module, export: Any, small_family: Family, tmp_path: Path
) -> None:
    """vLLM reads the *.safetensors files listed in the index, or all of them without an index."""
    folder = tmp_path / "export"
    export(network, folder, earlier)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    export(network, folder, later)
    index = folder / "model.safetensors.index.json"
    listed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert index.exists() == (later != UNSPLIT_BYTES)
    assert {file.name for file in folder.glob("*.safetensors")} == listed
    assert same(weights_in(folder, small_family), dict(network.named_parameters()))


def test_an_export_removes_the_earlier_adapter(network: nn.Module, export: Any, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    export(network, folder)
    assert not (folder / "adapter").exists()
    assert not (folder / ".partial").exists()
    assert (folder / "config.json").exists()


def test_a_failed_export_leaves_the_earlier_one(
    network: nn.Module, export: Any, small_family: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    export(network, folder, SPLIT_BYTES)
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    with monkeypatch.context() as patched:
        patched.setattr(hugging_face, "_name_shards", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            export(network, folder, SPLIT_BYTES)
    assert same(weights_in(folder, small_family), before)
    export(network, folder, SPLIT_BYTES)
    assert same(weights_in(folder, small_family), dict(network.named_parameters()))


def test_a_failed_first_export_is_no_model(
    network: nn.Module, export: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """mode=check and runs that start from the folder look for its config.json."""
    folder = tmp_path / "export"
    monkeypatch.setattr(hugging_face, "_name_shards", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        export(network, folder, SPLIT_BYTES)
    assert not (folder / "config.json").exists()
    assert not list(folder.glob("*.safetensors"))


def test_a_folder_during_replacement_is_no_model(tmp_path: Path) -> None:
    """At that time some files are of the earlier export and some of the new one."""
    partial = tmp_path / ".partial"
    partial.mkdir()
    (tmp_path / "config.json").write_text("{}")
    (partial / "config.json").write_text("{}")
    (tmp_path / "tokenizer").write_text("a file cannot be replaced by a folder")
    (partial / "tokenizer").mkdir()
    with pytest.raises(NotADirectoryError):
        replace_export(tmp_path, partial)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("shard_bytes", [UNSPLIT_BYTES, SPLIT_BYTES])
def test_all_ranks_gather_the_same_weights_in_order(
    shard_bytes: int, network: nn.Module, export: Any, gathered: list[list[Tensor]], tmp_path: Path
) -> None:
    """Under ZeRO-3 each gather is a collective: one more on any rank would hang all of them."""
    layer = next(name for name, module in network.named_modules() if name.endswith("q_proj"))
    add_adapters(network, rank=2, alpha=4, layers=[layer])
    by_rank = []
    for rank in (0, 1):
        gathered.clear()
        export(network, tmp_path / str(rank), shard_bytes, rank)
        by_rank.append([[id(part) for part in parts] for parts in gathered])
    assert by_rank[0] == by_rank[1]
    assert len(by_rank[0]) > 20
    assert (tmp_path / "0" / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "1").exists()

"""mode=check inspects data, model files and disk before any actor starts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from shutil import disk_usage

import pytest

from othink_ray.config.load import load
from othink_ray.config.rules import transport_of
from othink_ray.config.schema import Config
from othink_ray.data import Split
from othink_ray.driver import preflight as preflight_module
from othink_ray.driver.preflight import PreflightReport, preflight
from othink_ray.types import Prompt
from tests.data.files import picture, write_jsonl


def test_a_valid_run_is_described_in_numbers(model_folder: Path) -> None:
    found = preflight(load([f"model.path={model_folder}"]))
    assert not found.problems
    assert found.lines["data.train"].endswith("0 of 32 checked are bad")
    assert "million weights" in found.lines["model files"]
    assert "a learner rank" in found.lines["memory"]
    assert "a rollout actor" in found.lines["memory"]
    assert "0 do not fit" in found.lines["context"]


def test_a_model_that_does_not_exist_yet_is_not_checked(tmp_path: Path) -> None:
    found = preflight(load([f"run.cache_dir={tmp_path}"]))
    assert not found.problems
    assert found.lines["model files"] == "created at the first start: not checked, and no memory plan"


def test_a_hub_model_is_checked_if_it_is_in_the_cache(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    requested = load(["model=qwen2_vl_2b", "model.path=someone/small", "model.dtype=float32"])
    missing = preflight(requested).lines
    assert missing["model files"].endswith("hf download someone/small") and "memory" not in missing
    copy = tmp_path / "models--someone--small"
    shutil.copytree(model_folder, copy / "snapshots" / "0123abc")
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text("0123abc")
    weights = copy / "snapshots" / "0123abc" / "model.safetensors"
    weights.rename(copy / "elsewhere")  # only the configuration is left
    assert preflight(requested).lines["model files"] == missing["model files"]
    (copy / "elsewhere").rename(weights)
    found = preflight(requested)
    assert not found.problems
    assert "million weights" in found.lines["model files"] and "a learner rank" in found.lines["memory"]


def test_weights_that_are_not_safetensors_are_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    [problem] = preflight(load([f"model.path={folder}"])).problems
    assert "can run code" in str(problem)


def test_a_model_that_cannot_be_opened_is_a_problem(model_folder: Path) -> None:
    [problem] = preflight(load([f"model.path={model_folder}", "model.family=internvl"])).problems
    assert "set model.family=qwen2_vl" in " ".join(str(problem).split())


def test_prompts_over_the_length_limit_are_a_problem(model_folder: Path) -> None:
    [problem] = preflight(load([f"model.path={model_folder}", "rollout.max_model_len=70"])).problems
    assert problem.subject == "rollout.max_model_len = 70"
    assert "questions checked fits; the first, " in problem.rule


@pytest.mark.parametrize(("placeholders", "subject"), [(2, "rollout.max_images = 1"), (1, "data = counting")])
def test_the_image_limit_is_named_where_it_is_the_one_broken(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, placeholders: int, subject: str
) -> None:
    sample = preflight_module._sample

    def doubled(config: Config, split: Split) -> tuple[str, list[Prompt]]:
        text, prompts = sample(config, split)
        messages = [tuple(replace(turn, images=turn.images * placeholders) for turn in one.messages) for one in prompts]
        both = zip(prompts, messages, strict=True)
        return text, [replace(one, images=one.images * 2, messages=turns) for one, turns in both]

    monkeypatch.setattr(preflight_module, "_sample", doubled)
    [problem] = preflight(load([f"model.path={model_folder}"])).problems
    assert problem.subject == subject


def test_a_disk_without_room_for_checkpoints_is_a_problem(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=2**20)
    monkeypatch.setattr(preflight_module.shutil, "disk_usage", lambda _: usage)
    [problem] = preflight(load([f"model.path={model_folder}", "train.keep_last=3"])).problems
    assert "5 checkpoints" in str(problem)
    assert "train.keep_last" in str(problem)


def test_adapters_need_less_memory_and_less_disk(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, adapted = f"model.path={model_folder}", "learner.lora.rank=4"
    whole, few = (preflight(load([path, *more])).lines for more in ([], [adapted]))
    assert whole["trained"] == whole["model files"].partition(",")[0]
    assert few["trained"] == "29184 weights"  # 4 x (in + out) of seven matrices in each of three layers
    assert "float32 weights" in whole["memory"]
    assert "reference" not in few["memory"]
    monkeypatch.setattr(preflight_module.shutil, "disk_usage", lambda _: disk_usage("/")._replace(free=20 * 2**20))
    assert [len(preflight(load([path, *more])).problems) for more in ([], [adapted])] == [1, 0]


@pytest.mark.parametrize("cluster", ["local", "one_node", "one_gpu", "one_node_colocated"])
def test_adapters_use_shared_memory_on_every_cluster(cluster: str) -> None:
    whole, adapters = (load([f"cluster={cluster}", f"learner.lora.rank={rank}"]) for rank in (0, 4))
    assert transport_of(adapters) == "shared_memory"
    assert (transport_of(whole) == "shared_memory") == (cluster == "local")


def test_an_unknown_lora_target_names_the_nearest_one(model_folder: Path) -> None:
    requested = ["learner.lora.rank=4", "learner.lora.targets=[q_porj]"]
    [problem] = preflight(load([f"model.path={model_folder}", *requested])).problems
    assert problem.subject == "learner.lora.targets = [q_porj]"
    assert problem.remedy.startswith("Did you mean q_proj? It has: ")


def test_bad_rows_are_counted_and_all_bad_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture(1))
    good = {"image": "1.png", "problem": "How many?", "solution": "3"}
    for name, rows in (("some", [good, good | {"image": "2.png"}]), ("none", [good | {"image": "2.png"}] * 3)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)

    def report_of(name: str) -> PreflightReport:
        columns = {"image": "image", "question": "problem", "answer": "solution"}
        settings = {"source": "jsonl", "files.path": tmp_path / f"{name}.jsonl"}
        settings |= {f"files.columns.{use}": column for use, column in columns.items()}
        parts = [f"data.{split}.{key}={value}" for split in ("train", "test") for key, value in settings.items()]
        return preflight(load(["data=custom", f"run.cache_dir={tmp_path}", *parts]))

    assert "1 of 2 checked are bad, such as custom/train/000001: image file" in report_of("some").lines["data.train"]
    assert ["all 3 rows of the data source are bad" in str(problem) for problem in report_of("none").problems] == [
        True,
        True,
    ]

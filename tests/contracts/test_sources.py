"""The contract of data sources: deterministic rows by number, each a valid, gradable prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from othink_ray.config.bounds import GENERATED
from othink_ray.config.bounds import SOURCES as KNOWN
from othink_ray.config.load import load
from othink_ray.config.schema import DataConfig
from othink_ray.data import SOURCES, PromptStream, Source, open_source, open_training, validate, worked_answer
from othink_ray.data.tables import OPENERS, ArrowTable
from othink_ray.rewards import accuracy, format_reward
from tests.data.files import ROWS, own_data, picture, train_columns, write_jsonl, write_parquet, write_r1v_test

pytestmark = pytest.mark.usefixtures("no_network")


def _scenes(folder: Path) -> DataConfig:
    return load(["data.train.size=6"]).data


def _geometry(folder: Path) -> DataConfig:
    return load(["data=geometry", "data.train.size=6"]).data


def _both(folder: Path) -> DataConfig:
    return load(["data=both", "data.train.size=6"]).data


def _parquet_bytes(folder: Path) -> DataConfig:
    return own_data(write_parquet(folder / "train.parquet", [picture(n) for n in range(ROWS)]))


def _parquet_structs(folder: Path) -> DataConfig:
    images = [{"bytes": picture(n), "path": f"{n}.png"} for n in range(ROWS)]
    return own_data(write_parquet(folder / "train.parquet", images))


def _parquet_paths(folder: Path) -> DataConfig:
    write_r1v_test(folder)
    return own_data(write_parquet(folder / "train.parquet", [f"images/{n}.png" for n in range(ROWS)]))


def _parquet_folder(folder: Path) -> DataConfig:
    for shard in range(2):
        write_parquet(folder / "data" / f"train-{shard}.parquet", [picture(3 * shard + n) for n in range(3)])
    return own_data(folder / "data")


def _parquet_streamed(folder: Path) -> DataConfig:
    return own_data(write_parquet(folder / "train.parquet", [picture(n) for n in range(ROWS)]), stream_buffer=3)


def _jsonl(folder: Path) -> DataConfig:
    file = write_r1v_test(folder)
    return own_data(file, source="jsonl", image="image_path", question="question", answer="ground_truth")


def _saved(folder: Path) -> datasets.Dataset:
    images = [{"bytes": picture(n), "path": None} for n in range(ROWS)]
    features = {"image": datasets.Image(), "problem": datasets.Value("string"), "solution": datasets.Value("string")}
    return datasets.Dataset.from_dict(train_columns(images), features=datasets.Features(features))


def _disk(folder: Path) -> DataConfig:
    _saved(folder).save_to_disk(folder / "saved")
    return own_data(folder / "saved", source="disk")


def _disk_of_splits(folder: Path) -> DataConfig:
    datasets.DatasetDict({"train": _saved(folder), "test": _saved(folder)}).save_to_disk(folder / "saved")
    return own_data(folder / "saved", source="disk", split="train")


def _hub(folder: Path) -> DataConfig:
    """Return a local copy of a hub data set's layout: `datasets` loads both the same way."""
    _saved(folder).to_parquet(folder / "repository" / "data" / "train-00000-of-00001.parquet")
    return own_data(folder / "repository", source="hub", split="train")


def _easy_vqa(folder: Path) -> DataConfig:
    return load(["data=easy_vqa", "data.train.size=6"]).data


TASKS_OF = {"both": ("counting", "geometry")}
LAYOUTS: dict[str, Callable[[Path], DataConfig]] = {
    "scenes": _scenes,
    "geometry_scenes": _geometry,
    "both_scenes": _both,
    "parquet": _parquet_bytes,
    "parquet of structs": _parquet_structs,
    "parquet of paths": _parquet_paths,
    "parquet in a folder": _parquet_folder,
    "jsonl": _jsonl,
    "disk": _disk,
    "disk with splits": _disk_of_splits,
    "hub": _hub,
    "easy_vqa": _easy_vqa,
}
FIXED = (*GENERATED, "easy_vqa")  # sources whose rows do not come from the user's files


@pytest.fixture(params=LAYOUTS)
def data(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    return LAYOUTS[request.param](tmp_path)


@pytest.fixture
def source(data: DataConfig) -> Source:
    return open_source(data, "train")


def test_every_source_has_a_test_and_a_config_entry() -> None:
    assert set(SOURCES) <= set(LAYOUTS)
    assert set(SOURCES) == set(KNOWN)
    assert set(SOURCES) - set(GENERATED) == set(OPENERS)


def test_rows_are_valid_prompts(source: Source, data: DataConfig) -> None:
    assert len(source) == ROWS
    for index in range(ROWS):
        prompt = source.prompt(index)
        assert validate(prompt) is prompt
        assert prompt.task in TASKS_OF.get(data.name, (data.task,))
        assert len(prompt.images) == prompt.messages[0].images == 1
        assert prompt.messages[0].text.endswith(f" {data.prompt_suffix}")


def test_rows_have_distinct_ids_that_name_the_split(source: Source) -> None:
    ids = [source.prompt(index).id for index in range(ROWS)]
    assert len(set(ids)) == ROWS
    assert all("/train/" in row_id for row_id in ids)


def test_rows_are_the_same_in_any_order_and_instance(source: Source, data: DataConfig) -> None:
    again = open_source(data, "train")
    assert [again.prompt(index) for index in reversed(range(ROWS))][::-1] == [source.prompt(i) for i in range(ROWS)]


@pytest.mark.parametrize("index", [-1, ROWS])
def test_a_row_out_of_range_is_an_index_error(source: Source, index: int) -> None:
    with pytest.raises(IndexError, match=f"has rows 0 to {ROWS - 1}, not {index}"):
        source.prompt(index)


def test_the_worked_answer_earns_both_rewards(source: Source) -> None:
    for index in range(ROWS):
        prompt = source.prompt(index)
        assert accuracy(worked_answer(prompt), prompt.answer) == 1.0
        assert format_reward(worked_answer(prompt)) == 1.0


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in FIXED and "folder" not in name])
def test_files_of_any_layout_give_the_same_questions(layout: str, tmp_path: Path) -> None:
    data = LAYOUTS[layout](tmp_path)
    source = open_source(data, "train")
    for number in range(ROWS):
        prompt = source.prompt(number)
        assert prompt.images == (picture(number),)
        assert prompt.answer == str(number)
        assert prompt.messages[0].text == f"How many items are in picture {number}? {data.prompt_suffix}"
        assert prompt.id == f"custom/train/{number:06d}"


@pytest.mark.parametrize("layout", [*LAYOUTS, "streamed"])
@pytest.mark.parametrize("taken", [0, 1, 5, 6, 7, 15])
def test_a_stream_resumes_exactly_at_a_position(layout: str, taken: int, tmp_path: Path) -> None:
    data = {**LAYOUTS, "streamed": _parquet_streamed}[layout](tmp_path)
    stream = PromptStream(open_training(data), seed=3, on_bad_row="stop")
    stream.take(taken)
    resumed = PromptStream(open_training(data), seed=3, on_bad_row="stop", position=stream.position)
    assert resumed.take(4) == stream.take(4)
    assert resumed.take(9) == stream.take(9)


def test_an_unreachable_hub_name_is_named_with_its_key(tmp_path: Path) -> None:
    data = load(["data=clevr"]).data
    with pytest.raises(ValueError, match=r"data\.train\.files\.path = leonardPKU/clevr_cogen_a_train cannot be read: "):
        open_source(data, "train")


def test_length_and_columns_are_known_without_reading_rows(tmp_path: Path) -> None:
    table = ArrowTable(_saved(tmp_path))
    assert (len(table), list(table.columns)) == (ROWS, ["image", "problem", "solution"])


def test_the_test_split_may_come_from_other_files(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", [picture(n) for n in range(3)])
    data = own_data(train, write_r1v_test(tmp_path / "eval"))
    assert (len(open_source(data, "train")), len(open_source(data, "test"))) == (3, ROWS)
    prompt = open_source(data, "test").prompt(2)
    assert (prompt.id, prompt.answer, prompt.images) == ("custom/test/000002", "2", (picture(2),))


def test_geoqa_in_r1v_layout_keeps_its_degrees(tmp_path: Path) -> None:
    write_r1v_test(tmp_path)
    rows = [{"image_path": "./images/0.png", "question": "Find x.", "ground_truth": "145°"}]
    file = write_jsonl(tmp_path / "geoqa.jsonl", rows)
    data = load(["data=geoqa", f"data.test.files.path='{file}'", f"data.test.files.image_root='{tmp_path}'"]).data
    prompt = open_source(data, "test").prompt(0)
    assert (prompt.answer, prompt.task, prompt.images) == ("145°", "geometry", (picture(0),))

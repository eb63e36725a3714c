from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from othink_ray.config.schema import DataConfig
from othink_ray.data import PromptStream, SourceError, open_training
from othink_ray.data.prompt_stream import StreamingRows
from tests.data.files import own_data, picture, with_files, write_parquet

pytestmark = pytest.mark.usefixtures("no_network")

SHARDS, EACH = 3, 5
ALL = SHARDS * EACH


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    for shard in range(SHARDS):
        keys = [f"{shard}-{n}" for n in range(EACH)]
        write_parquet(tmp_path / "set" / f"{shard}.parquet", [picture(n) for n in range(EACH)], key=keys)
    return own_data(tmp_path / "set", stream_buffer=4, id="key")


def stream(data: DataConfig, *, seed: int = 0, position: int = 0) -> PromptStream:
    return PromptStream(open_training(data), seed=seed, on_bad_row="drop", position=position)


def keys(stream: PromptStream, n: int) -> list[str]:
    return [prompt.id.rpartition("/")[2].partition("#")[0] for prompt in stream.take(n)]


def test_each_epoch_has_every_row_once_in_a_new_order(data: DataConfig) -> None:
    prompts = stream(data)
    epochs = [keys(prompts, ALL) for _ in range(3)]
    assert all(sorted(epoch) == sorted(f"{s}-{n}" for s in range(SHARDS) for n in range(EACH)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != sorted(epochs[0])


def test_the_order_depends_only_on_the_seed(data: DataConfig) -> None:
    assert keys(stream(data, seed=1), 2 * ALL) == keys(stream(data, seed=1), 2 * ALL)
    assert keys(stream(data, seed=1), ALL) != keys(stream(data, seed=2), ALL)


@pytest.mark.parametrize("taken", [0, 1, ALL - 1, ALL, ALL + 1, 3 * ALL - 1, 3 * ALL + 2])
def test_a_stream_resumes_exactly_at_a_position(data: DataConfig, taken: int) -> None:
    first = stream(data, seed=5)
    first.take(taken)
    resumed = stream(data, seed=5, position=first.position)
    assert keys(resumed, 2 * ALL) == keys(first, 2 * ALL)


def test_positions_can_be_revisited(data: DataConfig) -> None:
    order = StreamingRows(data, "train").order(0)
    assert order.prompt(3).id == order.prompt(3).id
    later = order.prompt(9).id
    assert order.prompt(3).id != later
    assert order.prompt(9).id == later


def test_a_size_limit_keeps_the_first_rows(data: DataConfig) -> None:
    prompts = stream(with_files(data, size=4))
    assert sorted(keys(prompts, 4)) == ["0-0", "0-1", "0-2", "0-3"]
    assert sorted(keys(prompts, 4)) == ["0-0", "0-1", "0-2", "0-3"]


def test_rows_without_an_id_column_get_a_content_hash(data: DataConfig, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "one.parquet", [picture(n) for n in range(4)])
    prompts = stream(own_data(file, stream_buffer=2))
    epochs = [{prompt.id for prompt in prompts.take(4)} for _ in range(2)]
    assert epochs[0] == epochs[1]
    assert len(epochs[0]) == 4


def test_bad_rows_are_dropped_and_reported_once(tmp_path: Path) -> None:
    images = [picture(0), b"corrupt", picture(2), picture(3)]
    file = write_parquet(tmp_path / "set.parquet", images, key=list("abcd"))
    prompts = stream(own_data(file, stream_buffer=2, id="key"))
    assert sorted(keys(prompts, 6)) == ["a", "a", "c", "c", "d", "d"]
    assert [row for row, _ in prompts.dropped] == ["custom/train/b"]


def test_a_data_set_of_only_bad_rows_raises_and_names_one(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "set.parquet", [b"corrupt"] * 3, key=list("abc"))
    with pytest.raises(
        SourceError, match=r"all 3 rows of the data source are bad, the last one custom/train/[abc]: image 1"
    ):
        stream(own_data(file, stream_buffer=2, id="key")).take(1)


def test_a_missing_column_is_reported_at_construction(data: DataConfig) -> None:
    with pytest.raises(SourceError, match=r"columns\.question = problm is not a column of .*; did you mean problem\?"):
        stream(with_files(data, question="problm"))


def test_streaming_leaves_nothing_on_disk(data: DataConfig) -> None:
    stream(data).take(ALL)
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from othink_ray.data import BadRow, PromptStream, SourceError, open_source
from othink_ray.data.sources import unique_ids
from tests.data.files import custom_data, picture, question, train_columns, with_files, write_jsonl, write_parquet

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "train.parquet", [picture(n) for n in range(3)], key=["a", "b", "a"])


def line(number: int, **changes: object) -> dict[str, object]:
    return {"image": f"{number}.png", "problem": question(number), "solution": number} | changes


def jsonl(folder: Path, *rows: object) -> Path:
    for number in range(len(rows)):
        (folder / f"{number}.png").write_bytes(picture(number))
    return write_jsonl(folder / "train.jsonl", rows)


# ---- errors before the first prompt


@pytest.mark.parametrize(("source", "suffixes"), [("parquet", r"\*\.parquet"), ("jsonl", r"\*\.jsonl or \*\.ndjson")])
def test_a_missing_file_is_named_with_its_key(source: str, suffixes: str, tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"data\.train\.files\.path = .*/none is not a file, a folder or a glob pattern"
    ):
        open_source(custom_data(tmp_path / "none", source=source), "train")
    with pytest.raises(
        SourceError, match=rf"data\.train\.files\.path = .* contains no {suffixes} file; relative paths start from"
    ):
        open_source(custom_data(tmp_path, source=source), "train")


def test_a_missing_column_is_named_with_the_closest_one(parquet: Path) -> None:
    with pytest.raises(
        SourceError,
        match=r"data\.train\.files\.columns\.image = images is not a column of .*parquet; did "
        r"you mean image\? its columns: image, problem, solution, key",
    ):
        open_source(custom_data(parquet, image="images"), "train")
    for role in ("question", "answer", "id"):
        with pytest.raises(SourceError, match=rf"data\.train\.files\.columns\.{role} = zzz is not a column"):
            open_source(custom_data(parquet, **{role: "zzz"}), "train")


def test_each_of_several_image_columns_must_exist(parquet: Path) -> None:
    with pytest.raises(SourceError, match=r"columns\.image = image_2 is not a column"):
        open_source(custom_data(parquet, image="image, image_2"), "train")


@pytest.mark.parametrize("buffer", [None, 4])
def test_an_empty_parquet_data_set_is_rejected(buffer: int | None, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from othink_ray.data import open_training

    columns = {
        "image": pa.array([], pa.binary()),
        "problem": pa.array([], pa.string()),
        "solution": pa.array([], pa.string()),
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(
        SourceError, match=r"data\.train\.files\.path = .*: the data set has 0 rows; check the path and the split"
    ):
        source = open_training(custom_data(tmp_path / "train.parquet", stream_buffer=buffer))
        PromptStream(source, seed=0, on_bad_row="drop").take(1)


def test_an_empty_jsonl_file_is_rejected(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", [])
    with pytest.raises(SourceError, match="the data set has 0 rows"):
        open_source(custom_data(file, source="jsonl"), "train")


def test_an_invalid_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("not parquet")
    with pytest.raises(SourceError, match=r"path = .*train\.parquet cannot be read: ArrowInvalid: .*magic bytes"):
        open_source(custom_data(tmp_path / "train.parquet"), "train")


def test_a_folder_without_a_saved_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"cannot be read: FileNotFoundError: .*; give a folder written by save_to_disk"
    ):
        open_source(custom_data(tmp_path, source="disk"), "train")


def test_an_unknown_split_is_named_with_the_known_ones(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(train_columns(["0.png"]))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    for split in ("tset", None):
        with pytest.raises(
            SourceError, match=rf"data\.train\.files\.split = {split} is not a split of .*: train, test"
        ):
            open_source(custom_data(tmp_path / "saved", source="disk", split=split), "train")
    rows.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(SourceError, match=r'data\.train\.files\.split = tset: Unknown split "tset"'):
        open_source(custom_data(tmp_path / "hub", source="hub", split="tset"), "train")


def test_a_missing_image_root_is_named(parquet: Path) -> None:
    with pytest.raises(SourceError, match=r"data\.train\.files\.image_root = /none is not a folder"):
        open_source(custom_data(parquet, image_root="/none"), "train")


# ---- ids and sizes


def test_repeated_ids_of_the_id_column_get_the_row_number(parquet: Path) -> None:
    source = open_source(custom_data(parquet, id="key"), "train")
    assert [source.prompt(n).id for n in range(3)] == ["custom/train/a", "custom/train/b", "custom/train/a#000002"]


def test_a_row_without_an_id_gets_its_number() -> None:
    assert unique_ids([7, None, "", 7, "7#000003"]) == ["7", "#000001", "#000002", "7#000003", "7#000003#000004"]


def test_a_size_limit_keeps_the_first_rows(parquet: Path) -> None:
    source = open_source(custom_data(parquet, size=2), "train")
    assert len(source) == 2
    with pytest.raises(IndexError):
        source.prompt(2)
    assert len(open_source(custom_data(parquet, size=100), "train")) == 3


# ---- invalid rows


def test_invalid_jsonl_lines_affect_only_their_own_rows(tmp_path: Path) -> None:
    rows = [line(0), '{"image": "1.png", "prob', line(2, solution="2"), "", "[1, 2]", "\ufeff7", line(5, solution=2.0)]
    source = open_source(custom_data(jsonl(tmp_path, *rows), source="jsonl"), "train")
    assert len(source) == 6, "a blank line is not a row"
    stream = PromptStream(source, seed=0, on_bad_row="drop")
    assert {prompt.id for prompt in stream.take(6)} >= {f"custom/train/{n:06d}" for n in (0, 2, 5)}
    assert sorted(row for row, _ in stream.dropped) == [f"custom/train/{n:06d}" for n in (1, 3, 4)]
    assert (
        dict(stream.dropped)["custom/train/000003"]
        == "it cannot be read: it is a JSON list, not an object; fix it or remove it"
    )
    with pytest.raises(BadRow, match=r"row custom/train/000001: it cannot be read: .*; fix it or remove it"):
        source.prompt(1)


def test_invalid_lines_have_no_id(tmp_path: Path) -> None:
    rows = [line(0, key="x"), "{invalid", line(2, key="x")]
    source = open_source(custom_data(jsonl(tmp_path, *rows), source="jsonl", id="key"), "train")
    assert source.prompt(0).id == "custom/train/x"
    assert source.prompt(2).id == "custom/train/x#000002"
    with pytest.raises(BadRow, match="row custom/train/#000001: it cannot be read"):
        source.prompt(1)


def test_excessively_nested_json_is_an_invalid_line(tmp_path: Path) -> None:
    source = open_source(custom_data(jsonl(tmp_path, line(0), "[" * 100_000), source="jsonl"), "train")
    with pytest.raises(BadRow, match="row custom/train/000001: it cannot be read"):
        source.prompt(1)


def test_a_data_set_of_only_invalid_rows_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"files\.path = .*: no line is a readable JSON object; write one object per line"
    ):
        open_source(custom_data(jsonl(tmp_path, "{", "["), source="jsonl"), "train")


def test_several_files_are_read_in_order_of_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", [line(2, image="2.png")])
    jsonl(tmp_path, line(0), line(1), line(2))
    data = with_files(custom_data(tmp_path / "[bt]*.jsonl"), source="jsonl")
    source = open_source(data, "train")
    assert [source.prompt(n).answer for n in range(4)] == ["2", "0", "1", "2"]

"""Bad inputs and the message of each: bad rows are dropped with a reason, unusable data sets stop the run.

docs/bad_inputs.md is generated from this table.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from othink_ray.config.load import load
from othink_ray.data import BadRow, PromptStream, SourceError, open_source
from othink_ray.data.sources import RowReader
from othink_ray.engines.base import Sampling
from othink_ray.engines.vllm_rollout import VLLMRollout
from othink_ray.families.base import Family
from tests.data.files import custom_data, picture, write_jsonl, write_parquet
from tests.engines.samples import ask

PAGE = Path(__file__).parents[2] / "docs" / "bad_inputs.md"
GOOD = {"image": None, "problem": "How many?", "solution": "<answer> 3 </answer>"}


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def blank(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height))


def bomb() -> bytes:
    """Return a PNG of a few bytes whose header claims 60,000 x 60,000 pixels."""
    small = bytearray(encoded(blank(8, 8)))
    small[16:24] = (60_000).to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    return bytes(small)


def fat_text_chunk() -> bytes:
    """Return a PNG with a text chunk that decompresses to 100 MB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "0" * 100_000_000, zip=True)
    return encoded(blank(28, 28), pnginfo=info)


def gif(frames: int) -> bytes:
    first, *others = [blank(28, 28, "P") for _ in range(frames)]
    for number, frame in enumerate(others):
        frame.putpixel((number, 0), 1)
    return encoded(first, "GIF", save_all=True, append_images=others)


def noise(width: int, height: int) -> NDArray[np.uint8]:
    """Return pixels that are the same in every process."""
    return np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


IMAGES: dict[str, Callable[[], Any]] = {
    "a PNG cut in half": lambda: (lambda whole: whole[: len(whole) // 2])(picture(1)),
    "a JPEG cut in half": lambda: (lambda whole: whole[: len(whole) // 2])(encoded(blank(280, 280), "JPEG")),
    "a PNG without its last bytes": lambda: encoded(Image.fromarray(noise(90, 90)))[:-600],
    "an empty file": lambda: b"",
    "text instead of an image": lambda: b"<html>404</html>",
    "a decompression bomb": bomb,
    "a PNG whose text chunk decompresses to 100 MB": fat_text_chunk,
    "an image of 1 x 1 pixels": lambda: encoded(blank(1, 1)),
    "an image of 20000 x 10 pixels": lambda: encoded(blank(20_000, 10)),
    "an image of 9000 x 6000 pixels": lambda: encoded(blank(9000, 6000, "L")),
    "an animated GIF": lambda: gif(3),
    "a TIFF": lambda: encoded(blank(28, 28), "TIFF"),
    "a WebP": lambda: encoded(blank(28, 28), "WEBP"),
    "a grayscale PNG": lambda: encoded(blank(56, 28, "L")),
    "a 16-bit grayscale PNG": lambda: encoded(blank(56, 28, "I;16")),
    "a PNG with a palette and a transparent color": lambda: encoded(blank(56, 28, "P"), transparency=0),
    "a transparent PNG": lambda: encoded(blank(56, 28, "RGBA")),
    "a CMYK JPEG": lambda: encoded(blank(56, 28, "CMYK"), "JPEG"),
    "a JPEG rotated by its EXIF orientation": lambda: encoded(blank(56, 28), "JPEG", exif=_rotated()),
    "a path that does not exist": lambda: "missing.png",
    "a path that contains NUL": lambda: "nul\0.png",
    "a folder instead of an image": lambda: ".",
    "a path outside the image root": lambda: "../elsewhere.png",
    "a device instead of an image": lambda: "/dev/zero",
    "a number instead of an image": lambda: 17,
    "no image": lambda: None,
    "an empty list of images": list,
    "more images than rollout.max_images": lambda: [picture(number) for number in range(9)],
}


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


ROWS: dict[str, dict[str, Any]] = {
    "an empty question": {"problem": ""},
    "a question of whitespace": {"problem": " \n\t "},
    "a missing question": {"problem": None},
    "a question of 1 MB": {"problem": "How many? " * 100_000},
    "a question that contains the model's placeholder": {"problem": "<|image_pad|> How many?"},
    "a question with two markers and one image": {"problem": "<image> <image> How many?"},
    "a question with NUL and an unpaired surrogate": {"problem": "How\0 many \ud83d?"},
    "an empty answer": {"solution": ""},
    "a missing answer": {"solution": None},
    "an answer of empty tags": {"solution": "<answer> </answer>"},
}


def _empty(folder: Path) -> dict[str, Any]:
    return {"path": str(write_parquet(folder / "none.parquet", []))}


def _wrong_column(folder: Path) -> dict[str, Any]:
    return {"path": str(write_parquet(folder / "t.parquet", [picture(1)])), "question": "probelm"}


def _truncated_parquet(folder: Path) -> dict[str, Any]:
    file = write_parquet(folder / "t.parquet", [picture(1)])
    file.write_bytes(file.read_bytes()[:-20])
    return {"path": str(file)}


def _invalid_lines(folder: Path) -> dict[str, Any]:
    return {"path": str(write_jsonl(folder / "t.jsonl", ['{"image": "a', "[1, 2]"])), "source": "jsonl"}


def _nested_line(folder: Path) -> dict[str, Any]:
    return {"path": str(write_jsonl(folder / "t.jsonl", ["[" * 100_000])), "source": "jsonl"}


def _missing(folder: Path) -> dict[str, Any]:
    return {"path": str(folder / "nowhere")}


def _no_files(folder: Path) -> dict[str, Any]:
    return {"path": str(folder)}


def _missing_root(folder: Path) -> dict[str, Any]:
    return {"path": str(write_parquet(folder / "t.parquet", [picture(1)])), "image_root": str(folder / "none")}


SETS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "an empty data set": _empty,
    "a column that does not exist": _wrong_column,
    "a truncated parquet file": _truncated_parquet,
    "a JSONL file of invalid lines": _invalid_lines,
    "a JSON line nested 100,000 levels deep": _nested_line,
    "a data set path that does not exist": _missing,
    "a folder without data files": _no_files,
    "an image_root that does not exist": _missing_root,
}


# ---- the messages


def outcome_of_row(row: dict[str, Any], folder: Path, family: Family) -> str:
    """Read, validate and length-filter a row as the stream does, and return the outcome."""
    rollout = load(["rollout.max_model_len=192", "rollout.max_tokens=24", "rollout.max_images=2"]).rollout
    try:
        prompt = RowReader(custom_data(".", source="hub", image_root=str(folder)), "train").prompt("own/7", row)
        family.check_fits(rollout, prompt)
    except BadRow as bad:
        return f"dropped: {bad.text}"
    counts, images = family.image_token_counts(prompt.images), family.encode_images(prompt.images)
    assert sum(counts) == family.encoded_token_count(images)
    return f"accepted, with {sum(counts)} image tokens"


def outcome_of_data_set(files: dict[str, Any]) -> str:
    path = files.pop("path")
    data = custom_data(path, **{"source": "parquet"} | files)
    try:
        PromptStream(open_source(data, "train"), seed=0, on_bad_row="drop").take(1)
    except SourceError as error:
        return f"stopped: {error}"
    return "accepted"


def table(folder: Path, family: Family) -> Iterator[tuple[str, str]]:
    for name, image in IMAGES.items():
        yield name, outcome_of_row(GOOD | {"image": image()}, folder, family)
    for name, changes in ROWS.items():
        yield name, outcome_of_row(GOOD | {"image": picture(1)} | changes, folder, family)
    for number, (name, make) in enumerate(SETS.items()):
        parent = folder / str(number)
        parent.mkdir()
        yield name, outcome_of_data_set(make(parent)).replace(str(parent), "…").replace(str(Path.cwd()), "…")


def page(rows: Iterator[tuple[str, str]], folder: Path) -> str:
    return HEAD + "".join(f"| {name} | {_escaped(outcome, folder)} |\n" for name, outcome in rows)


def _escaped(outcome: str, folder: Path) -> str:
    return outcome.replace(str(folder), "…").replace("|", "\\|").replace("\0", "␀")


HEAD = """# Bad inputs and their messages

A dropped row is listed with its reason and remedy on the console and in `summary.json`. With `data.on_bad_row=stop` it
ends the run with the same text. An unusable data set ends the run before any actor starts.
`tests/data/test_bad_inputs.py` generates this page.

| input | outcome |
|---|---|
"""


def test_each_bad_input_gives_the_message_on_the_page(tmp_path: Path, family: Family, no_network: None) -> None:
    found = page(table(tmp_path, family), tmp_path)
    assert found.count("\n") - HEAD.count("\n") >= 40
    assert not re.findall(r"Traceback|0x[0-9a-f]{6}|site-packages", found)
    if os.environ.get("WRITE_PAGES"):
        PAGE.write_text(found)
    assert found == PAGE.read_text(), "docs/bad_inputs.md is out of date: run with WRITE_PAGES=1 to regenerate it"


def test_an_exif_rotated_image_is_upright_everywhere(family: Family, vllm_engine: VLLMRollout) -> None:
    wide, rotated = (
        encoded(Image.linear_gradient("L").resize((56, 28)), "JPEG", **options)
        for options in ({}, {"exif": _rotated()})
    )
    [[_, height, width]] = family.encode_images([wide]).grids.tolist()
    assert width > height
    assert family.encode_images([rotated]).grids.tolist() == [[1, width, height]]
    prompt = ask("rotated", rotated)
    [probe] = vllm_engine.probe([prompt], Sampling(answers=1, max_tokens=2, temperature=1.0, seed=0), 4)
    expanded = family.expand(family.prompt_token_ids(prompt), family.image_token_counts([rotated]))
    assert probe.group.prompt_token_ids.tolist() == expanded

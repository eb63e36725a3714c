"""Bad inputs, each with the message that it gives: what is dropped is named and counted, what cannot be used says why.

docs/bad_inputs.md is this table.
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
from othink_ray.families.base import Family, check_fits
from tests.data.files import own_data, picture, write_jsonl, write_parquet
from tests.engines.samples import ask

PAGE = Path(__file__).parents[2] / "docs" / "bad_inputs.md"
GOOD = {"image": None, "problem": "How many?", "solution": "<answer> 3 </answer>"}


def encoded(image: Image.Image, format: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **how)
    return buffer.getvalue()


def blank(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height))


def bomb() -> bytes:
    """A few kilobytes that say of themselves that they are 60,000 x 60,000 pixels."""
    small = bytearray(encoded(blank(8, 8)))
    small[16:24] = (60_000).to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    return bytes(small)


def fat_text_chunk() -> bytes:
    """A text chunk of a PNG that unpacks to 100 MB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "0" * 100_000_000, zip=True)
    return encoded(blank(28, 28), pnginfo=info)


def gif(frames: int) -> bytes:
    first, *others = [blank(28, 28, "P") for _ in range(frames)]
    for number, frame in enumerate(others):
        frame.putpixel((number, 0), 1)
    return encoded(first, "GIF", save_all=True, append_images=others)


def noise(width: int, height: int) -> NDArray[np.uint8]:
    """The same in every process."""
    return np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


IMAGES: dict[str, Callable[[], Any]] = {
    "an image cut in half": lambda: (lambda whole: whole[: len(whole) // 2])(picture(1)),
    "a JPEG cut in half": lambda: (lambda whole: whole[: len(whole) // 2])(encoded(blank(280, 280), "JPEG")),
    "an image without its last bytes": lambda: encoded(Image.fromarray(noise(90, 90)))[:-600],
    "no bytes at all": lambda: b"",
    "text in place of an image": lambda: b"<html>404</html>",
    "a decompression bomb": bomb,
    "a PNG whose text unpacks to 100 MB": fat_text_chunk,
    "an image of 1 x 1 pixels": lambda: encoded(blank(1, 1)),
    "an image of 20000 x 10 pixels": lambda: encoded(blank(20_000, 10)),
    "an image of 9000 x 6000 pixels": lambda: encoded(blank(9000, 6000, "L")),
    "an animated GIF": lambda: gif(3),
    "a TIFF": lambda: encoded(blank(28, 28), "TIFF"),
    "a WebP": lambda: encoded(blank(28, 28), "WEBP"),
    "a grayscale PNG": lambda: encoded(blank(56, 28, "L")),
    "a grayscale PNG of 16 bits": lambda: encoded(blank(56, 28, "I;16")),
    "a PNG with a palette and a transparent colour": lambda: encoded(blank(56, 28, "P"), transparency=0),
    "a transparent PNG": lambda: encoded(blank(56, 28, "RGBA")),
    "a CMYK JPEG": lambda: encoded(blank(56, 28, "CMYK"), "JPEG"),
    "a JPEG that EXIF turns": lambda: encoded(blank(56, 28), "JPEG", exif=_turned()),
    "a path that leads nowhere": lambda: "missing.png",
    "a path with a NUL in it": lambda: "nul\0.png",
    "a folder in place of an image": lambda: ".",
    "a path that leads out of the image root": lambda: "../elsewhere.png",
    "a device in place of an image": lambda: "/dev/zero",
    "a number in place of an image": lambda: 17,
    "no image": lambda: None,
    "an empty list of images": list,
    "more images than rollout.max_images": lambda: [picture(number) for number in range(9)],
}


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


ROWS: dict[str, dict[str, Any]] = {
    "an empty question": {"problem": ""},
    "a question of blanks": {"problem": " \n\t "},
    "a missing question": {"problem": None},
    "a question of 1 MB": {"problem": "How many? " * 100_000},
    "a question that spells the model's placeholder": {"problem": "<|image_pad|> How many?"},
    "a question with two markers and one image": {"problem": "<image> <image> How many?"},
    "a question with NUL and half a surrogate pair": {"problem": "How\0 many \ud83d?"},
    "an empty answer": {"solution": ""},
    "a missing answer": {"solution": None},
    "an answer of empty tags": {"solution": "<answer> </answer>"},
}


def _empty(folder: Path) -> dict[str, Any]:
    return {"path": str(write_parquet(folder / "none.parquet", []))}


def _wrong_column(folder: Path) -> dict[str, Any]:
    return {"path": str(write_parquet(folder / "t.parquet", [picture(1)])), "question": "probelm"}


def _torn_parquet(folder: Path) -> dict[str, Any]:
    file = write_parquet(folder / "t.parquet", [picture(1)])
    file.write_bytes(file.read_bytes()[:-20])
    return {"path": str(file)}


def _torn_lines(folder: Path) -> dict[str, Any]:
    return {"path": str(write_jsonl(folder / "t.jsonl", ['{"image": "a', "[1, 2]"])), "source": "jsonl"}


def _deep_line(folder: Path) -> dict[str, Any]:
    return {"path": str(write_jsonl(folder / "t.jsonl", ["[" * 100_000])), "source": "jsonl"}


def _nowhere(folder: Path) -> dict[str, Any]:
    return {"path": str(folder / "nowhere")}


def _no_files(folder: Path) -> dict[str, Any]:
    return {"path": str(folder)}


def _no_root(folder: Path) -> dict[str, Any]:
    return {"path": str(write_parquet(folder / "t.parquet", [picture(1)])), "image_root": str(folder / "none")}


SETS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "an empty data set": _empty,
    "a column that is not there": _wrong_column,
    "a parquet file cut short": _torn_parquet,
    "a JSONL file of torn lines": _torn_lines,
    "a JSON line nested 100,000 deep": _deep_line,
    "a path that is not there": _nowhere,
    "a folder without files": _no_files,
    "an image_root that is not there": _no_root,
}


# ---- what a run says


def told_of_row(row: dict[str, Any], folder: Path, family: Family) -> str:
    """Read, checked and fitted as the stream does with each row."""
    rollout = load(["rollout.max_model_len=192", "rollout.max_tokens=24", "rollout.max_images=2"]).rollout
    try:
        prompt = RowReader(own_data(".", source="hub", image_root=str(folder)), "train").prompt("own/7", row)
        check_fits(family, rollout, prompt)
    except BadRow as bad:
        return f"dropped: {bad.reason}"
    counted, seen = family.image_token_counts(prompt.images), family.encode_images(prompt.images)
    assert sum(counted) == family.tokens_of(seen)
    return f"asked, with {sum(counted)} image tokens"


def told_of_set(files: dict[str, Any]) -> str:
    path = files.pop("path")
    data = own_data(path, **{"source": "parquet"} | files)
    try:
        PromptStream(open_source(data, "train"), seed=0, on_bad_row="drop").take(1)
    except SourceError as error:
        return f"stopped: {error}"
    return "asked"


def table(folder: Path, family: Family) -> Iterator[tuple[str, str]]:
    for name, image in IMAGES.items():
        yield name, told_of_row(GOOD | {"image": image()}, folder, family)
    for name, changes in ROWS.items():
        yield name, told_of_row(GOOD | {"image": picture(1)} | changes, folder, family)
    for number, (name, make) in enumerate(SETS.items()):
        place = folder / str(number)
        place.mkdir()
        yield name, told_of_set(make(place)).replace(str(place), "…").replace(str(Path.cwd()), "…")


def page(rows: Iterator[tuple[str, str]], folder: Path) -> str:
    return HEAD + "".join(f"| {name} | {_plain(told, folder)} |\n" for name, told in rows)


def _plain(told: str, folder: Path) -> str:
    return told.replace(str(folder), "…").replace("|", "\\|").replace("\0", "␀")


HEAD = """# Bad inputs, and what a run says of each

A row that is dropped is named in the console and counted in `summary.json`; `data.on_bad_row=stop` ends the run there.
A data set that cannot be used ends the run before any actor starts. `tests/data/test_bad_inputs.py` makes this page.

| input | what is said |
|---|---|
"""


def test_each_bad_input_is_told_as_the_page_has_it(tmp_path: Path, family: Family, no_network: None) -> None:
    found = page(table(tmp_path, family), tmp_path)
    assert found.count("\n") - HEAD.count("\n") >= 40
    assert not re.findall(r"Traceback|0x[0-9a-f]{6}|site-packages", found)
    if os.environ.get("WRITE_PAGES"):
        PAGE.write_text(found)
    assert found == PAGE.read_text(), "docs/bad_inputs.md is not what is said: WRITE_PAGES=1 writes it again"


def test_an_image_that_exif_turns_is_upright_for_both_sides(family: Family, vllm_engine: VLLMRollout) -> None:
    wide, turned = (
        encoded(Image.linear_gradient("L").resize((56, 28)), "JPEG", **how) for how in ({}, {"exif": _turned()})
    )
    [[_, height, width]] = family.encode_images([wide]).grids.tolist()
    assert width > height
    assert family.encode_images([turned]).grids.tolist() == [[1, width, height]]
    prompt = ask("turned", turned)
    [probe] = vllm_engine.probe([prompt], Sampling(answers=1, max_tokens=2, temperature=1.0, seed=0), 4)
    asked = family.expand(family.prompt_token_ids(prompt), family.image_token_counts([turned]))
    assert probe.group.prompt_token_ids.tolist() == asked

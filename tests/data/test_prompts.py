from __future__ import annotations

import io
import pickle
import struct
import zlib
from dataclasses import replace

import pytest
from PIL import Image

from othink_ray.data.prompts import BadRow, validate, with_thumbnails, worked_answer
from othink_ray.types import Message, Prompt


def picture(format: str = "PNG") -> bytes:
    image = Image.new("RGB", (64, 48))
    image.putdata([(x * 3 % 256, x * 7 % 256, x * 11 % 256) for x in range(64 * 48)])
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def blank_picture(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, format="PNG")
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def ask(
    text: str = "How many?", *, images: tuple[bytes, ...] = (), answer: str = "3", task: str = "counting"
) -> Prompt:
    message = Message(role="user", text=text, images=len(images))
    return Prompt(id="set/train/000007", messages=(message,), images=images, answer=answer, task=task)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_valid_prompt_passes_unchanged(format: str) -> None:
    prompt = ask(images=(picture(format),))
    assert validate(prompt) is prompt


def test_a_question_without_an_image_passes() -> None:
    prompt = ask()
    assert validate(prompt) is prompt


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        picture("PNG")[:-200],
        picture("PNG")[:40],
        picture("JPEG")[:-200],
        picture("GIF"),
        png_that_claims(0, 10),
        png_that_claims(10, 0),
        png_that_claims(64, 64),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    ],
    ids=["empty", "text", "cut", "cut early", "cut jpeg", "gif", "no width", "no height", "too few rows", "postscript"],
)
def test_an_undecodable_image_names_row_and_image(data: bytes) -> None:
    with pytest.raises(
        BadRow, match=r"row set/train/000007: image 2 \(\d+ bytes\) cannot be decoded: .*; replace it"
    ) as bad:
        validate(ask(images=(picture(), data)))
    assert " at 0x" not in str(bad.value)  # the message is the same in every run


@pytest.mark.parametrize("position", range(8, len(picture()), 37))
def test_a_png_with_a_flipped_byte_is_read_or_a_bad_row(position: int) -> None:
    data = bytearray(picture())
    data[position] ^= 0xFF
    prompt = ask(images=(bytes(data),))
    try:
        assert validate(prompt) is prompt
    except BadRow as bad:
        assert bad.row_id == prompt.id


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_000, 10_000, 60_000])
def test_a_decompression_bomb_is_rejected_before_decoding(side: int) -> None:
    with pytest.raises(BadRow, match=r"more than 50000000 pixels|DecompressionBombError"):
        validate(ask(images=(png_that_claims(side, side),)))


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_question_is_a_bad_row(text: str) -> None:
    with pytest.raises(BadRow, match="row set/train/000007: the question is empty; fill it in or remove the row"):
        validate(ask(text))


def test_a_system_message_is_not_a_question() -> None:
    prompt = replace(ask(), messages=(Message(role="system", text="You count."),))
    with pytest.raises(BadRow, match="the question is empty"):
        validate(prompt)


@pytest.mark.parametrize("answer", ["", " ", "<answer></answer>", " <answer>  </answer> "])
def test_a_missing_answer_is_a_bad_row(answer: str) -> None:
    with pytest.raises(BadRow, match="the answer is missing"):
        validate(ask(answer=answer))


def test_an_image_that_no_message_declares_is_a_bad_row() -> None:
    prompt = replace(ask(), images=(picture(),))
    with pytest.raises(BadRow, match=r"its messages declare 0 image\(s\) but the row has 1"):
        validate(prompt)


def test_a_bad_row_survives_pickling() -> None:
    bad = pickle.loads(pickle.dumps(BadRow("a/1", "it is corrupt", "fix it")))
    assert (bad.row_id, bad.reason, bad.remedy) == ("a/1", "it is corrupt", "fix it")
    assert str(bad) == "row a/1: it is corrupt; fix it"


@pytest.mark.parametrize("answer", ["3", " 3 ", "<answer> 3 </answer>", "<answer>3</answer>"])
def test_worked_answers_accept_plain_and_tagged_solutions(answer: str) -> None:
    assert worked_answer(ask(answer=answer)) == "<think> I count 3 items. </think><answer> 3 </answer>"


def test_a_worked_answer_may_omit_its_thought() -> None:
    prompt = replace(ask(answer="3"), thought="One, two, three.")
    assert worked_answer(prompt) == "<think> One, two, three. </think><answer> 3 </answer>"
    assert worked_answer(prompt, reasoning=False) == "<answer> 3 </answer>"


def test_a_task_without_worked_answers_is_named() -> None:
    with pytest.raises(
        BadRow, match="task 'poetry' has no worked answers; use a task that has them: counting, geometry"
    ):
        worked_answer(ask(task="poetry"))


def test_a_worked_answer_uses_the_thought_of_the_data_set() -> None:
    prompt = replace(ask(task="geometry", answer="70°"), thought="180-50-60=70")
    assert worked_answer(prompt) == "<think> 180-50-60=70 </think><answer> 70° </answer>"


@pytest.mark.parametrize("size", [(400, 2), (1, 200)])
def test_an_extreme_aspect_ratio_is_rejected(size: tuple[int, int]) -> None:
    with pytest.raises(BadRow, match="its aspect ratio must be below 200"):
        validate(ask(images=(blank_picture(size),)))


def test_thumbnails_keep_the_question_and_aspect_ratio() -> None:
    prompt = ask(images=(blank_picture((400, 100)), blank_picture((50, 20))))
    small = with_thumbnails(prompt, 80)
    assert [Image.open(io.BytesIO(image)).size for image in small.images] == [(80, 20), (50, 20)]
    assert small.images[1] == prompt.images[1]
    assert replace(small, images=prompt.images) == prompt

"""Prompts of data sets: validation, decoding of their images, and the worked answers used as SFT targets."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Literal, Protocol

from PIL import Image, ImageOps, UnidentifiedImageError

from othink_ray.types import Prompt

Split = Literal["train", "test"]

MAX_IMAGE_PIXELS = 50_000_000  # below Pillow's decompression bomb limit, far above what any model here uses
MAX_ASPECT_RATIO = 200  # Qwen's image processor rejects larger ratios
IMAGE_FORMATS = ("PNG", "JPEG")
_GRAY = (128, 128, 128)
_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# Reasoning text of an SFT target where the data set provides none, by task.
WORKINGS = {"counting": "I count {answer} items.", "geometry": "The figure gives {answer}.", "vqa": "I see {answer}."}


class BadRow(ValueError):
    """An unusable data row, with its id, the reason and the remedy."""

    def __init__(self, row_id: str, reason: str, remedy: str) -> None:
        # Pass all three to ValueError so that the error survives pickling between processes.
        super().__init__(row_id, reason, remedy)
        self.row_id = row_id
        self.reason = reason
        self.remedy = remedy

    @property
    def text(self) -> str:
        return f"{self.reason}; {self.remedy}"

    def __str__(self) -> str:
        return f"row {self.row_id}: {self.text}"


class Source(Protocol):
    """One split of a data set, by row number; `prompt` returns a validated prompt or raises BadRow."""

    def __len__(self) -> int: ...

    def prompt(self, index: int) -> Prompt: ...


def validate(prompt: Prompt) -> Prompt:
    """Return the prompt unchanged if it can be answered and graded, else raise BadRow."""
    if not any(message.role == "user" and message.text.strip() for message in prompt.messages):
        raise BadRow(prompt.id, "the question is empty", "fill it in or remove the row")
    for name, text in (("question", "".join(message.text for message in prompt.messages)), ("answer", prompt.answer)):
        if not _is_text(text):
            reason = f"the {name} is not valid Unicode: it contains an unpaired surrogate"
            raise BadRow(prompt.id, reason, "fix the text or remove the row")
    if not _plain_answer(prompt.answer):
        raise BadRow(prompt.id, "the answer is missing", "fill it in or remove the row")
    expected = sum(message.images for message in prompt.messages)
    if expected != len(prompt.images):
        reason = f"its messages declare {expected} image(s) but the row has {len(prompt.images)}"
        raise BadRow(prompt.id, reason, "make the messages' image counts add up to the number of images")
    for number, data in enumerate(prompt.images, start=1):
        _check_image(prompt.id, number, data)
    return prompt


def worked_answer(prompt: Prompt, *, reasoning: bool = True, answer_prefix: str = "") -> str:
    """Return the SFT target text: `<think>` thought `</think>` if `reasoning`, then `<answer>` solution `</answer>`.

    `answer_prefix` is the part of the answer that the chat template already writes. The target is what follows it: no
    tag is repeated, and the thought is empty where the template opens one but `reasoning` is false.
    """
    working = WORKINGS.get(prompt.task)
    if working is None:
        reason = f"task {prompt.task!r} has no worked answers"
        raise BadRow(prompt.id, reason, f"use a task that has them: {', '.join(WORKINGS)}")
    answer = _plain_answer(prompt.answer)
    thought = prompt.thought or working.format(answer=answer)
    target = f"<answer> {answer} </answer>"
    if reasoning or "<think>" in answer_prefix:
        target = (f"<think> {thought} </think>" if reasoning else "<think></think>") + target
    for tag in ("<think>", "</think>", "<answer>"):
        if tag in answer_prefix:
            target = target.partition(tag)[2]
    return target.lstrip() if answer_prefix[-1:].isspace() else target


def decode_image(image: bytes) -> Image.Image:
    """Decode to upright RGB: 16-bit gray is scaled to 8 bits, transparency is composited on white.

    Engines and learner both call it, so that they see identical pixels.
    """
    with Image.open(io.BytesIO(image)) as opened:
        upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I"):
        upright = upright.point(lambda value: value / 256).convert("L")
    if upright.has_transparency_data:
        background = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(background, upright.convert("RGBA"))
    return upright.convert("RGB")


def image_size(image: bytes) -> tuple[int, int]:
    """Return (width, height) of the upright image, reading only its header."""
    with Image.open(io.BytesIO(image)) as opened:
        width, height = opened.size
        transposed = opened.getexif().get(_ORIENTATION) in _TRANSPOSED
    return (height, width) if transposed else (width, height)


def with_thumbnails(prompt: Prompt, side: int) -> Prompt:
    """Return the prompt with its images downscaled to at most `side` pixels on the longer side."""
    return replace(prompt, images=tuple(_thumbnail(image, side) for image in prompt.images))


def with_gray_images(prompt: Prompt) -> Prompt:
    """Return the prompt with uniform gray images of the same sizes, to measure accuracy without their content."""
    return replace(prompt, images=tuple(_png(Image.new("RGB", image_size(image), _GRAY)) for image in prompt.images))


def _thumbnail(image: bytes, side: int) -> bytes:
    if max(image_size(image)) <= side:
        return image
    small = decode_image(image)
    small.thumbnail((side, side))
    return _png(small)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain_answer(answer: str) -> str:
    return answer.strip().removeprefix("<answer>").removesuffix("</answer>").strip()


def _check_image(row_id: str, number: int, data: bytes) -> None:
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height <= MAX_IMAGE_PIXELS:
                image.load()
    except UnidentifiedImageError as error:  # Pillow's message contains a memory address
        reason = f"image {number} ({len(data)} bytes) cannot be decoded: it is neither PNG nor JPEG"
        raise BadRow(row_id, reason, "replace it with a valid PNG or JPEG, or remove the row") from error
    # On corrupt bytes Pillow raises almost anything: OSError, SyntaxError, struct.error, DecompressionBombError.
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".removesuffix(".")
        reason = f"image {number} ({len(data)} bytes) cannot be decoded: {cause}"
        raise BadRow(row_id, reason, "replace it with a valid PNG or JPEG, or remove the row") from error
    if width * height > MAX_IMAGE_PIXELS:
        reason = f"image {number} is {width}x{height}, more than {MAX_IMAGE_PIXELS} pixels"
        raise BadRow(row_id, reason, "scale it down or remove the row")
    if max(width, height) >= MAX_ASPECT_RATIO * min(width, height):
        reason = f"image {number} is {width}x{height}: its aspect ratio must be below {MAX_ASPECT_RATIO}"
        raise BadRow(row_id, reason, "crop it or remove the row")

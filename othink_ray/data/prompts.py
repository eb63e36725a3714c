"""What a row must be before it is asked, and the worked answer that SFT imitates."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Literal, Protocol

from PIL import Image, UnidentifiedImageError

from othink_ray.data.images import decoded, size_of
from othink_ray.types import Prompt

Split = Literal["train", "test"]

MAX_IMAGE_PIXELS = 50_000_000  # below Pillow's own alarm, far above what any model here looks at
MAX_ASPECT_RATIO = 200  # image processors refuse what is longer
IMAGE_FORMATS = ("PNG", "JPEG")
_GREY = (128, 128, 128)
# The thought that SFT imitates where the data set has none of its own.
WORKINGS = {"counting": "I count {answer} items.", "geometry": "The figure gives {answer}.", "vqa": "I see {answer}."}


class BadRow(ValueError):
    """A row that cannot be asked: which one, why, and what to do about it."""

    def __init__(self, row_id: str, reason: str, remedy: str) -> None:
        # All three go to ValueError, so that the error survives pickling between processes.
        super().__init__(row_id, reason, remedy)
        self.row_id = row_id
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"row {self.row_id}: {self.reason}; {self.remedy}"


class Source(Protocol):
    """One split of a data set, by row number; `prompt` returns a validated row, or raises BadRow naming it."""

    def __len__(self) -> int: ...

    def prompt(self, index: int) -> Prompt: ...


def validate(prompt: Prompt) -> Prompt:
    """The prompt itself when it can be asked and graded; else BadRow."""
    if not any(message.role == "user" and message.text.strip() for message in prompt.messages):
        raise BadRow(prompt.id, "the question is empty", "fill it in or remove the row")
    for name, text in (("question", "".join(one.text for one in prompt.messages)), ("answer", prompt.answer)):
        if not _is_text(text):
            reason = f"the {name} holds half a character (a surrogate without its other half)"
            raise BadRow(prompt.id, reason, "mend the text or remove the row")
    if not _plain_answer(prompt.answer):
        raise BadRow(prompt.id, "the answer is missing", "fill it in or remove the row")
    placed = sum(message.images for message in prompt.messages)
    if placed != len(prompt.images):
        reason = f"its messages place {placed} image(s) but the row holds {len(prompt.images)}"
        raise BadRow(prompt.id, reason, "give every image exactly one place")
    for position, data in enumerate(prompt.images, start=1):
        _check_image(prompt.id, position, data)
    return prompt


def worked_answer(prompt: Prompt, *, reasoning: bool = True, opened: str = "") -> str:
    """The SFT target: a short thought, then the solution, in the format that the reward asks for; or no thought.

    Where the chat template has written the beginning of the answer (`opened`), the target is what comes after it: no
    tag twice, and an empty thought where one is open and none is wanted.
    """
    working = WORKINGS.get(prompt.task)
    if working is None:
        reason = f"task {prompt.task!r} has no worked answers"
        raise BadRow(prompt.id, reason, f"use a task that has them: {', '.join(WORKINGS)}")
    answer = _plain_answer(prompt.answer)
    thought = prompt.thought or working.format(answer=answer)
    target = f"<answer> {answer} </answer>"
    if reasoning or "<think>" in opened:
        target = (f"<think> {thought} </think>" if reasoning else "<think></think>") + target
    for tag in ("<think>", "</think>", "<answer>"):
        if tag in opened:
            target = target.partition(tag)[2]
    return target.lstrip() if opened[-1:].isspace() else target


def with_thumbnails(prompt: Prompt, side: int) -> Prompt:
    """The same question with images of at most `side` pixels in length: enough to ask, and quick to look at."""
    return replace(prompt, images=tuple(_thumbnail(image, side) for image in prompt.images))


def with_grey_images(prompt: Prompt) -> Prompt:
    """The same question with images of one grey, as large as its own: what is answered right now was not seen."""
    return replace(prompt, images=tuple(_png(Image.new("RGB", size_of(image), _GREY)) for image in prompt.images))


def _thumbnail(image: bytes, side: int) -> bytes:
    if max(size_of(image)) <= side:
        return image
    small = decoded(image)
    small.thumbnail((side, side))
    return _png(small)


def _png(image: Image.Image) -> bytes:
    written = io.BytesIO()
    image.save(written, format="PNG")
    return written.getvalue()


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain_answer(answer: str) -> str:
    return answer.strip().removeprefix("<answer>").removesuffix("</answer>").strip()


def _check_image(row_id: str, position: int, data: bytes) -> None:
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height <= MAX_IMAGE_PIXELS:
                image.load()
    except UnidentifiedImageError as error:  # its own text tells where in memory the bytes were
        reason = f"image {position} ({len(data)} bytes) cannot be decoded: it is neither PNG nor JPEG"
        raise BadRow(row_id, reason, "replace it by a sound PNG or JPEG, or remove the row") from error
    # Pillow's decoders raise almost anything on hostile bytes: OSError, SyntaxError, struct.error, its bomb error.
    except Exception as error:
        reason = f"image {position} ({len(data)} bytes) cannot be decoded: {type(error).__name__}: {error}"
        raise BadRow(row_id, reason, "replace it by a sound PNG or JPEG, or remove the row") from error
    if width * height > MAX_IMAGE_PIXELS:
        reason = f"image {position} is {width}x{height}, more than {MAX_IMAGE_PIXELS} pixels"
        raise BadRow(row_id, reason, "scale it down or remove the row")
    if max(width, height) >= MAX_ASPECT_RATIO * min(width, height):
        reason = f"image {position} is {width}x{height}, {MAX_ASPECT_RATIO} times as long as wide or more"
        raise BadRow(row_id, reason, "crop it or remove the row")

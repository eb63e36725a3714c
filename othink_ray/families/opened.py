"""What a chat template writes of an answer before the model does: `<think>` and a newline in many thinking models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from othink_ray.types import Message

_ASKED = Message(role="user", text="?")
_ANSWERED = Message(role="assistant", text="§past answer§")


def opened_by(render: Callable[[Sequence[Message], bool], str]) -> str:
    """The text that the template's generation prompt adds to the header of an answer; empty for most models.

    `render` writes a chat, with the generation prompt or without. The header is what stands before a past answer, one
    that another question follows: of the last answer a template may show more (Qwen3 adds an empty thought).
    """
    prompt = render([_ASKED], True)
    if prompt == render([_ASKED], False):
        return ""
    header = render([_ASKED, _ANSWERED, _ASKED], False).partition(_ANSWERED.text)[0]
    if prompt.startswith(header):
        return prompt[len(header) :]
    if header.startswith(prompt) and header[len(prompt) :].isspace():
        return ""
    # Past answers are shown after something else, such as an empty thought in each: an open thought is what is left.
    opened = prompt[prompt.rfind("<think>") :] if "<think>" in prompt else ""
    return "" if "</think>" in opened else opened

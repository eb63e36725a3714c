"""Detection of the answer prefix that a chat template writes, by comparing rendered chats."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from othink_ray.config.schema import Config
from othink_ray.families import open_family
from othink_ray.types import Message, Prompt
from tests.families.templates import with_template

TURN = """\
{%- for message in messages -%}
{%- set text = message.content if message.content is string else message.content | map(attribute="text") | join -%}
{%- if message.role != "assistant" -%}<|im_start|>{{ message.role }}{{ "\\n" + text }}<|im_end|>{{ "\\n" }}
{%- else -%}PAST{{ "<|im_end|>\\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}BEGIN{%- endif -%}"""
HEAD = '<|im_start|>assistant{{ "\\n" }}'
# Like Qwen3: the last answer is rendered with an (empty) thought, earlier ones without.
LAST_WITH_THOUGHT = HEAD + '{%- if loop.last -%}{{ "<think>\\n\\n</think>\\n\\n" }}{%- endif -%}{{ text }}'
# Like DeepSeek-R1: earlier answers are rendered without their thought.
WITHOUT_THOUGHT = HEAD + '{{ text.split("</think>") | last }}'
ALWAYS_WITH_THOUGHT = HEAD + '{{ "<think>\\n\\n</think>\\n\\n" + text }}'
TEMPLATES = [  # (template of a past answer, generation prompt, answer prefix in it)
    (HEAD + "{{ text }}", HEAD, ""),
    (HEAD + "{{ text }}", HEAD + "<think>", "<think>"),
    (HEAD + "{{ text }}", HEAD + '{{ "<think>\\n" }}', "<think>\n"),
    (HEAD + "{{ text | trim }}", HEAD + '{{ "<think>\\n" }}', "<think>\n"),
    (LAST_WITH_THOUGHT, HEAD + '{{ "<think>\\n" }}', "<think>\n"),
    (WITHOUT_THOUGHT, HEAD + '{{ "<think>\\n" }}', "<think>\n"),
    (HEAD + "{{ text }}", HEAD + '{{ "<think>\\n\\n</think>\\n\\n" }}', "<think>\n\n</think>\n\n"),
    ("{{ text }}", "", ""),
    (ALWAYS_WITH_THOUGHT, HEAD + '{{ "<think>\\n" }}', "<think>\n"),
    (ALWAYS_WITH_THOUGHT, HEAD + '{{ "<think>\\n</think>" }}', ""),
]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "model"
    shutil.copytree(model_folder, copied)
    return copied


@pytest.mark.parametrize(("past", "begin", "opened"), TEMPLATES)
def test_the_answer_prefix_is_what_follows_the_answer_header(
    past: str, begin: str, opened: str, folder: Path, config: Config
) -> None:
    with_template(folder, lambda _template: TURN.replace("PAST", past).replace("BEGIN", begin))
    family = open_family(config.model, str(folder))
    assert family.answer_prefix == opened
    assert family.answer_texts([family.encode_text("3"), []]) == [opened + "3", opened]
    prompt = Prompt(id="0", messages=(Message(role="user", text="How many?"),), images=(), answer="3", task="counting")
    [decoded] = family.decode([family.prompt_token_ids(prompt)])
    assert decoded.endswith(opened)

"""Chat templates that end with `<think>`, with or without a newline: the graded text and the demonstrations."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from othink_ray.config.schema import Config
from othink_ray.data import worked_answer
from othink_ray.engines.base import RolloutEngine, Sampling
from othink_ray.engines.demonstrations import Demonstrations
from othink_ray.engines.policy import Policy
from othink_ray.families import open_family
from othink_ray.families.base import Family
from othink_ray.rewards import Grader, format_reward, score_group, weighted_rewards
from othink_ray.types import Prompt
from tests.engines.samples import batch_of, give, row_of, sent_weights
from tests.families.templates import with_template
from tests.rewards.conftest import REWARD

GREEDY = Sampling(answers=1, max_tokens=32, temperature=0.0, seed=0)


@pytest.fixture(scope="module", params=["<think>", "<think>\n"], ids=["tag", "tag and newline"])
def opened(request: pytest.FixtureRequest) -> str:
    text: str = request.param
    return text


@pytest.fixture(scope="module")
def thinking(config: Config, model_folder: Path, opened: str, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Return the family of the tiny model with such a template."""
    folder = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(model_folder, folder)
    with_template(
        folder, lambda plain: plain.replace('assistant{{ "\\n" }}', f'assistant{{{{ "\\n" }}}}{{{{ {opened!r} }}}}')
    )
    return open_family(config.model, str(folder))


@pytest.fixture(scope="module")
def trained(thinking: Family, taught: Policy, scenes: Sequence[Prompt]) -> Policy:
    """Return a model after a few SFT steps on demonstrations under this template."""
    trained = copy.deepcopy(taught)
    samples = [row_of(group) for group in Demonstrations(thinking).answer(scenes)]
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(12):
        start = step * 16 % len(samples)
        logprobs, _ = trained(batch_of(samples[start : start + 16], thinking))
        optimizer.zero_grad()
        (-logprobs.mean()).backward()
        optimizer.step()
    return trained


def test_the_prompt_ends_with_the_opening_tag(thinking: Family, scenes: Sequence[Prompt], opened: str) -> None:
    [prompt] = thinking.decode([thinking.prompt_token_ids(scenes[0])])
    assert prompt.endswith(f"assistant\n{opened}")
    assert thinking.answer_prefix == opened


@pytest.mark.parametrize("reasoning", [True, False])
def test_a_demonstration_continues_the_prompt(
    thinking: Family, scenes: Sequence[Prompt], opened: str, reasoning: bool
) -> None:
    for group in Demonstrations(thinking, reasoning=reasoning).answer(scenes[:4]):
        [completion] = group.completions
        answer_ids = completion.token_ids.tolist()
        [whole] = thinking.decode([[*group.prompt_token_ids.tolist(), *answer_ids]])
        seen = whole.partition("assistant\n")[2]
        assert seen.count("<think>") == seen.count("</think>") == seen.count("<answer>") == 1
        assert seen == completion.text
        assert completion.text == opened + thinking.decode([answer_ids])[0]
        assert answer_ids[-1] == thinking.eos_token_id
        assert format_reward(completion.text) == 1.0
        thought = worked_answer(group.prompt).partition("</think>")[0].removeprefix("<think>").strip()
        assert (thought in completion.text) == reasoning


def test_the_graded_text_includes_the_templates_opening_tag(
    engine: RolloutEngine,
    thinking: Family,
    trained: Policy,
    scenes: Sequence[Prompt],
    opened: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "family", thinking)
    give(engine, sent_weights(trained.network), 1)
    prompts = [replace(prompt, id=f"{opened!r} {prompt.id}") for prompt in scenes[:4]]
    groups = list(engine.generate(prompts, GREEDY))
    assert len(groups) == 4
    with Grader(REWARD) as grader:
        for group in groups:
            [completion] = group.completions
            [answer_ids] = thinking.decode([completion.token_ids.tolist()])
            assert "<think>" not in answer_ids  # the tag is part of the prompt, so the model does not write it
            assert format_reward(answer_ids) == 0.0
            assert completion.text == opened + answer_ids
            assert score_group(group, weighted_rewards(REWARD, grader), grader.counts).parts["format"].tolist() == [1.0]


def test_an_answer_that_opens_the_thought_twice_has_no_format(thinking: Family) -> None:
    again = thinking.encode_text("<think> I count 3 items. </think><answer> 3 </answer>")
    [text] = thinking.answer_texts([again])
    assert format_reward(text) == 0.0

"""The contract of every rollout engine, run on vLLM in process and on plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from othink_ray.config.schema import Config
from othink_ray.engines.base import RolloutEngine, Sampling
from othink_ray.engines.policy import Policy
from othink_ray.families.base import Family
from othink_ray.types import Prompt
from tests.engines.samples import (
    MIXED,
    always_says,
    ask,
    batch_of,
    distributions,
    give,
    learner_gap,
    picture,
    row_of,
    sent_weights,
)

WARM = Sampling(answers=4, max_tokens=8, temperature=1.0, seed=7)
GREEDY = Sampling(answers=1, max_tokens=24, temperature=0.0, seed=0)


def answers(engine: RolloutEngine, prompts: Sequence[Prompt], sampling: Sampling) -> dict[str, list[list[int]]]:
    return {
        group.prompt.id: [completion.token_ids.tolist() for completion in group.completions]
        for group in engine.generate(prompts, sampling)
    }


# ---- contents of a group


def test_a_fixed_length_answer_continues_past_the_end_token(
    engine: RolloutEngine, policy: Policy, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = MIXED[0]
    give(engine, sent_weights(always_says(policy, family, prompt, family.eos_token_id).network), 1)
    [ended] = engine.generate([prompt], WARM)
    monkeypatch.setattr(engine, "fixed_length", True)
    [fixed] = engine.generate([prompt], WARM)
    for short, long in zip(ended.completions, fixed.completions, strict=True):
        assert (len(short.token_ids), short.finish) == (1, "stop")
        assert (len(long.token_ids), long.finish) == (WARM.max_tokens, "length")
        assert long.token_ids[0] == family.eos_token_id


def test_each_prompt_gets_its_answers_with_token_logprobs(engine: RolloutEngine) -> None:
    groups = list(engine.generate(MIXED, WARM))
    assert sorted(group.prompt.id for group in groups) == sorted(prompt.id for prompt in MIXED)
    for group in groups:
        assert len(group.completions) == WARM.answers
        assert group.prompt in MIXED
        assert group.version == 0
        assert group.prompt_token_ids.dtype == np.int64
        for completion in group.completions:
            assert 1 <= len(completion.token_ids) <= WARM.max_tokens
            assert completion.token_ids.shape == completion.sampler_logprobs.shape
            assert completion.token_ids.dtype == np.int64
            assert completion.sampler_logprobs.dtype == np.float32
            assert (completion.sampler_logprobs <= 0).all()


def test_the_text_is_the_decoded_tokens_without_the_end(
    engine: RolloutEngine, family: Family, taught: Policy, scenes: Sequence[Prompt]
) -> None:
    give(engine, sent_weights(taught.network), 1)
    for group in engine.generate(scenes[:2], replace(WARM, max_tokens=32)):
        for completion in group.completions:
            assert completion.text == family.decode([completion.token_ids.tolist()])[0]
            assert completion.text.startswith("<think>")
            assert completion.text.endswith("</answer>")


def test_the_prompt_is_expanded_as_by_the_family(engine: RolloutEngine, family: Family) -> None:
    for group in engine.generate(MIXED, replace(WARM, answers=1, max_tokens=1)):
        counts = family.image_token_counts(group.prompt.images)
        assert group.prompt_token_ids.tolist() == family.expand(family.prompt_token_ids(group.prompt), counts)


def test_images_beyond_pixel_bounds_are_resized_as_by_learner(
    engine: RolloutEngine, family: Family, config: Config, policy: Policy
) -> None:
    bounds = {"too large": config.model.max_pixels // 784, "too small": config.model.min_pixels // 784}
    found = {group.prompt.id: group for group in engine.generate(MIXED[3:], WARM)}
    tokens = {name: int((group.prompt_token_ids == family.image_token_id).sum()) for name, group in found.items()}
    assert 0.7 * bounds["too large"] <= tokens["too large"] <= bounds["too large"] < 500 * 400 // 784
    assert tokens["too small"] == bounds["too small"] > 1
    assert all(learner_gap(policy, family, group).mean() < 1e-4 for group in found.values())


# ---- sampler and learner compute the same logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampled_logprobs_equal_the_learners(
    engine: RolloutEngine, family: Family, taught: Policy, temperature: float
) -> None:
    give(engine, sent_weights(taught.network), 1)
    learner = Policy(taught.network, family, temperature, logit_rows=64)
    for group in engine.generate(MIXED, replace(WARM, temperature=temperature, max_tokens=24)):
        gap = learner_gap(learner, family, group)
        assert gap.mean() < 1e-4
        assert gap.max() < 1e-3


def test_another_image_changes_the_logprobs(engine: RolloutEngine) -> None:
    prompts = [ask("left", picture(84, 84, 0)), ask("right", picture(84, 84, 1))]
    left, right = engine.probe(prompts, replace(WARM, answers=1, max_tokens=1), 16)
    by_token = [dict(zip(probe.candidates[0], probe.logprobs[0], strict=True)) for probe in (left, right)]
    assert left.group.prompt_token_ids.tolist() == right.group.prompt_token_ids.tolist()
    assert max(abs(by_token[0][token] - by_token[1][token]) for token in by_token[0].keys() & by_token[1]) > 1e-3


# ---- seeds


def test_answers_do_not_depend_on_the_batch_of_prompts(engine: RolloutEngine) -> None:
    together = answers(engine, MIXED, WARM)
    assert answers(engine, MIXED[::-1], WARM) == together
    apart: dict[str, list[list[int]]] = {}
    for prompt in MIXED:
        apart |= answers(engine, [prompt], WARM)
    assert apart == together


def test_another_seed_changes_the_answers(engine: RolloutEngine) -> None:
    first, second = answers(engine, MIXED, WARM), answers(engine, MIXED, replace(WARM, seed=8))
    assert all(first[name] != second[name] for name in first)


def test_answers_differ_within_a_group_and_between_prompt_ids(engine: RolloutEngine) -> None:
    twins = [ask("a", picture(84, 84, 0)), ask("b", picture(84, 84, 0))]
    found = answers(engine, twins, WARM)
    assert len({tuple(answer) for group in found.values() for answer in group}) == 2 * WARM.answers


def test_a_prompt_repeated_in_a_batch_gets_two_groups(engine: RolloutEngine) -> None:
    """A batch across the end of an epoch can contain a prompt twice."""
    groups = list(engine.generate([MIXED[0], MIXED[1], MIXED[0]], WARM))
    first, second = (group for group in groups if group.prompt.id == MIXED[0].id)
    assert len(groups) == 3
    assert [c.token_ids.tolist() for c in first.completions] == [c.token_ids.tolist() for c in second.completions]


def test_more_answers_than_max_num_seqs_are_all_sampled(engine: RolloutEngine, config: Config) -> None:
    wide = replace(WARM, answers=config.rollout.max_num_seqs + 3)
    found = answers(engine, MIXED, wide)
    assert [len(found[prompt.id]) for prompt in MIXED] == [wide.answers] * len(MIXED)
    assert all(len({tuple(answer) for answer in group}) == wide.answers for group in found.values())


def test_prefetched_prompts_are_prepared_once_and_answer_alike(
    engine: RolloutEngine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(engine, MIXED, WARM)
    engine.prefetch(MIXED)
    with monkeypatch.context() as broken:
        broken.setattr(type(family), "prompt_token_ids", lambda family, prompt: pytest.fail("prepared twice"))
        assert answers(engine, MIXED, WARM) == expected
    assert answers(engine, MIXED, WARM) == expected


def test_closing_an_iterator_early_leaves_the_next_batch_intact(engine: RolloutEngine) -> None:
    expected = answers(engine, MIXED[:2], WARM)
    left = iter(engine.generate(MIXED[2:], WARM))
    next(left)
    del left
    assert answers(engine, MIXED[:2], WARM) == expected


# ---- greedy


def test_greedy_answers_ignore_the_seed(engine: RolloutEngine, taught: Policy) -> None:
    give(engine, sent_weights(taught.network), 1)
    assert answers(engine, MIXED, GREEDY) == answers(engine, MIXED, replace(GREEDY, seed=5))


def test_both_engines_agree_on_greedy_answers(
    vllm_engine: RolloutEngine, hf_engine: RolloutEngine, taught: Policy, scenes: Sequence[Prompt]
) -> None:
    prompts = [*MIXED, *scenes[:8]]
    for opened in (vllm_engine, hf_engine):
        give(opened, sent_weights(taught.network), 1)
    by_vllm, by_hf = answers(vllm_engine, prompts, GREEDY), answers(hf_engine, prompts, GREEDY)
    assert by_vllm == by_hf
    assert len({tuple(answer) for [answer] in by_hf.values()}) > 1


def test_greedy_tokens_are_the_likeliest_candidates(engine: RolloutEngine) -> None:
    for probe in engine.probe(MIXED, GREEDY, 3):
        assert probe.candidates[:, 0].tolist() == probe.group.completions[0].token_ids.tolist()


# ---- ends of answers


def test_the_end_token_is_part_of_the_answer_and_stops_it(
    engine: RolloutEngine, family: Family, policy: Policy
) -> None:
    forced = always_says(policy, family, MIXED[0], family.eos_token_id)
    give(engine, sent_weights(forced.network), 1)
    [group] = engine.generate(MIXED[:1], WARM)
    for completion in group.completions:
        assert completion.token_ids.tolist() == [family.eos_token_id]
        assert (completion.finish, completion.text) == ("stop", "")


def test_answers_of_a_group_end_at_different_lengths(
    engine: RolloutEngine, family: Family, taught: Policy, scenes: Sequence[Prompt]
) -> None:
    give(engine, sent_weights(taught.network), 1)
    hot = Sampling(answers=8, max_tokens=24, temperature=1.6, seed=3)
    ended = []
    for group in engine.generate(scenes[:4], hot):
        for completion in group.completions:
            ids = completion.token_ids.tolist()
            stopped = ids[-1] == family.eos_token_id
            assert family.eos_token_id not in ids[:-1]
            assert completion.finish == ("stop" if stopped else "length")
            assert stopped or len(ids) == hot.max_tokens
            ended.append((completion.finish, len(ids)))
        assert learner_gap(Policy(taught.network, family, hot.temperature, logit_rows=64), family, group).mean() < 1e-4
    assert {finish for finish, _ in ended} == {"stop", "length"}
    assert len({length for _, length in ended}) > 2


def test_an_answer_stops_at_the_max_model_len(engine: RolloutEngine, config: Config) -> None:
    long = ask("long", text="3 " * 80)
    [group] = engine.generate([long], replace(WARM, max_tokens=100))
    room = config.rollout.max_model_len - len(group.prompt_token_ids)
    assert 0 < room < 100
    assert "length" in {completion.finish for completion in group.completions}
    for completion in group.completions:
        assert len(completion.token_ids) == room or completion.finish == "stop"


def test_a_prompt_without_room_for_an_answer_is_refused(engine: RolloutEngine) -> None:
    with pytest.raises(ValueError, match=r"prompt endless.*rollout\.max_model_len"):
        list(engine.generate([MIXED[0], ask("endless", text="3 " * 300)], WARM))
    assert set(answers(engine, MIXED[:2], WARM)) == {"one image", "no image"}


# ---- vision tokens are banned


def test_a_vision_token_is_never_sampled(engine: RolloutEngine, family: Family, policy: Policy) -> None:
    for token_id in family.banned_token_ids:
        forced = always_says(policy, family, MIXED[0], token_id)
        give(engine, sent_weights(forced.network), 1)
        [group] = engine.generate(MIXED[:1], replace(WARM, max_tokens=4))
        sampled = {int(token) for completion in group.completions for token in completion.token_ids}
        assert not sampled & set(family.banned_token_ids)
        assert learner_gap(forced, family, group).mean() < 1e-4


def test_a_forced_token_that_is_not_banned_is_sampled(engine: RolloutEngine, family: Family, policy: Policy) -> None:
    """Shows that the test above can fail."""
    forced = always_says(policy, family, MIXED[0], 200)
    give(engine, sent_weights(forced.network), 1)
    [group] = engine.generate(MIXED[:1], replace(WARM, max_tokens=1))
    assert {int(token) for completion in group.completions for token in completion.token_ids} == {200}


# ---- probes


def test_a_probe_holds_sorted_top_tokens_at_each_position(
    engine: RolloutEngine, family: Family, taught: Policy
) -> None:
    give(engine, sent_weights(taught.network), 1)
    probes = engine.probe(MIXED, Sampling(answers=1, max_tokens=6, temperature=1.0, seed=0), 8)
    assert [probe.group.prompt.id for probe in probes] == [prompt.id for prompt in MIXED]
    for probe in probes:
        length = len(probe.group.completions[0].token_ids)
        assert probe.candidates.shape == probe.logprobs.shape == (length, 8)
        assert probe.candidates.dtype == np.int64
        assert probe.logprobs.dtype == np.float32
        sample = row_of(probe.group)
        with torch.no_grad():
            expected = distributions(taught, batch_of([sample], family))[:length]
        assert expected.topk(8).values.numpy() == pytest.approx(probe.logprobs, abs=1e-4)
        for tokens, logprobs in zip(probe.candidates, probe.logprobs, strict=True):
            assert len(set(tokens.tolist())) == 8
            assert all(more >= less for more, less in pairwise(logprobs))

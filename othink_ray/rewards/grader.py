"""Score completions: the accuracy reward R_acc of Eq. 1 (rules, then math-verify) and the weighted sum of rewards."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import isfinite
from types import MappingProxyType
from typing import Self, TypeAlias

import numpy as np

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards.closed_form import closed_form
from othink_ray.rewards.custom import CustomReward
from othink_ray.rewards.numbers import is_expression, may_be_number, plain
from othink_ray.rewards.parse import answer_text, format_reward, stated_in, stated_text
from othink_ray.rewards.quantity import parse_quantity, same
from othink_ray.rewards.sandbox import GradingFailed, SymbolicProcess, SymbolicVerdict
from othink_ray.rewards.text import parse_choice, same_words, split_items
from othink_ray.types import Group, ScoredGroup

MAX_CHARS = 256  # longer answers are compared as plain strings
_CACHE_SIZE = 1024  # symbolic verdicts kept: the answers of a group often repeat, and so do prompts


def accuracy(text: str, answer: str) -> float:
    """Return 1.0 if the rules prove that the completion's answer equals the true one, else 0.0.

    Only the text inside `<answer>…</answer>` is graded. The true answer is plain (3) or tagged.
    Answers that the rules cannot decide (`compare` returns None: variables, functions, sets) count as wrong here;
    `Grader` passes them to math-verify in a process that can be killed.
    """
    stated = stated_text(text)
    return float(stated is not None and compare(stated, true_text(answer)) is True)


def true_text(answer: str) -> str:
    """Return the true answer without its <answer> tag, if it has one."""
    tagged = answer_text(answer)
    return answer if tagged is None else tagged


def compare(stated: str, truth: str) -> bool | None:
    """Return whether two answers agree, or None if the rules cannot decide.

    Numbers are compared by exact value (see `parse_quantity`); choices by letter, and also by value if both have one;
    words by `same_words`; multiple answers (45° or 135°) in any order. Equal texts agree. A sentence is compared by the
    answer it states about its subject.
    """
    if len(stated) > MAX_CHARS or len(truth) > MAX_CHARS:
        stated, truth = stated.strip(), truth.strip()
        if len(stated) > MAX_CHARS or len(truth) > MAX_CHARS:
            return stated == truth
    return _compare(stated, truth)


@lru_cache(maxsize=4096)
def _compare(stated: str, truth: str) -> bool | None:
    stated_words, true_words = stated.split(), truth.split()
    if not stated_words or not true_words:
        return False
    if stated_words == true_words:
        return True
    both = (*stated_words, *true_words)
    if len(stated_words) == len(true_words) == 1 and all(word.isascii() and word.isdigit() for word in both):
        return int(stated_words[0]) == int(true_words[0])  # fast path for counting: 10x faster than the rules below
    plain_stated, plain_truth = plain(stated), plain(truth)
    verdict = _compare_plain(plain_stated, plain_truth)
    if verdict is False and (inner := stated_in(plain_stated)) is not None:
        return _compare_plain(plain(inner), plain_truth) is True
    return verdict


def _compare_plain(stated: str, truth: str) -> bool | None:
    choice, true_choice = parse_choice(stated), parse_choice(truth)
    if true_choice is not None and true_choice.letter.isupper():
        if choice is None:
            return bool(true_choice.rest) and _compare_plain(stated, true_choice.rest)
        if choice.letter.upper() != true_choice.letter:
            return False
        return not (choice.rest and true_choice.rest) or _compare_plain(choice.rest, true_choice.rest)
    if choice is not None and choice.rest:
        stated = choice.rest
    value, true_value = parse_quantity(stated), parse_quantity(truth)
    if value is not None and true_value is not None:
        return same(value, true_value)
    if true_value is not None:
        return None if is_expression(stated) and may_be_number(stated) else False
    if is_expression(truth):
        return None if is_expression(stated) or closed_form(stated) is not None else False
    if len(items := split_items(truth)) > 1:
        return _same_items(split_items(stated), items)
    return same_words(stated, truth)


def _same_items(stated: list[str], truth: list[str]) -> bool:
    """Return whether each of multiple answers (45° or 135°) is stated exactly once, in any order, and nothing else."""
    unmatched = list(truth)
    for item in stated:
        match = next((true_item for true_item in unmatched if _compare_plain(item, true_item) is True), None)
        if match is None:
            return False
        unmatched.remove(match)
    return not unmatched


class Grader:
    """Accuracy reward with all layers; `counts` holds the number of answers that each layer decided.

    An answer that exceeds the time or memory limit of the symbolic layer is wrong, not masked: it was not proven right,
    and the policy must not learn that an expression too costly to evaluate avoids a reward of 0.
    """

    def __init__(self, reward: RewardConfig) -> None:
        self.without_tag = reward.without_tag
        self.counts: Counter[str] = Counter()
        self.symbolic = SymbolicProcess(answer_cpu_s=reward.answer_cpu_s, memory_mb=reward.memory_mb)
        self._cache: OrderedDict[tuple[str, str], SymbolicVerdict] = OrderedDict()

    def accuracy(self, text: str, answer: str) -> float:
        """Return 1.0 or 0.0; never raise on the text."""
        stated = stated_text(text, self.without_tag)
        if stated is None:
            self.counts["untagged"] += 1
            return 0.0
        truth = true_text(answer)
        verdict = compare(stated, truth)
        if verdict is not None:
            self.counts["rules"] += 1
            return float(verdict)
        symbolic = self._compare_symbolically(plain(stated.strip()), plain(truth.strip()))
        self.counts["symbolic" if symbolic in ("right", "wrong") else symbolic] += 1
        return float(symbolic == "right")

    def _compare_symbolically(self, stated: str, truth: str) -> SymbolicVerdict:
        key = (stated, truth)
        if key not in self._cache:
            self._cache[key] = self.symbolic.equal(truth, stated)
            if len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return self._cache[key]

    def close(self) -> None:
        self.symbolic.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


Reward: TypeAlias = Callable[[str, str, Grader], float]  # (completion text, true answer, grader) -> reward


def _accuracy(text: str, answer: str, grader: Grader) -> float:
    return grader.accuracy(text, answer)


def _format(text: str, answer: str, grader: Grader) -> float:
    return format_reward(text)


REWARDS: dict[str, Reward] = {
    "accuracy": _accuracy,
    "format": _format,
}


def score_group(
    group: Group, reward: RewardConfig, grader: Grader, custom: Mapping[str, Reward] = MappingProxyType({})
) -> ScoredGroup:
    """Return the rewards (G,) of a group: accuracy_weight * accuracy + format_weight * format, plus custom rewards.

    An answer on which a reward function raises or returns a non-finite value gets 0 and is marked invalid; the other
    answers of the group keep their rewards.
    """
    functions = {**REWARDS, **custom}
    weights = {"accuracy": reward.accuracy_weight, "format": reward.format_weight}
    size = len(group.completions)
    parts = {name: np.zeros(size) for name in functions}
    valid = np.ones(size, dtype=np.bool_)
    before = grader.counts.copy()
    for index, completion in enumerate(group.completions):
        scores = _score(functions, completion.text, group.prompt.answer, grader)
        valid[index] = scores is not None
        for name, value in (scores or {}).items():
            parts[name][index] = value
    rewards = sum((weights.get(name, reward.own_weight) * part for name, part in parts.items()), np.zeros(size))
    return ScoredGroup(group=group, rewards=rewards, parts=parts, valid=valid, graded=dict(grader.counts - before))


def opened(custom: CustomReward) -> dict[str, Reward]:
    """Return {name: function} of a custom reward, with the signature of the built-in rewards."""
    function = custom.function()
    return {custom.name: lambda text, answer, grader: function(text, answer)}


def _score(functions: Mapping[str, Reward], text: str, answer: str, grader: Grader) -> dict[str, float] | None:
    try:
        scores = {name: float(function(text, answer, grader)) for name, function in functions.items()}
    except GradingFailed:  # the installation is broken, not this answer: the run must stop with an error
        raise
    # Reward functions can be user code, and their input is untrusted model output: any failure masks only this answer.
    except Exception:
        return None
    return scores if all(isfinite(value) for value in scores.values()) else None

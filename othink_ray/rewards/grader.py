"""The accuracy reward R_acc of Eq. 1, by rules: exact, in-process and in microseconds."""

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
from othink_ray.rewards.sandbox import GradingFailed, Outcome, SymbolicProcess
from othink_ray.rewards.text import parse_choice, same_words, split_items
from othink_ray.types import Group, ScoredGroup

MAX_CHARS = 256  # longer answers are only compared letter by letter


def accuracy(text: str, answer: str) -> float:
    """1.0 if the answer stated in the completion is certainly the true one, else 0.0.

    Only what stands inside <answer>…</answer> is graded. The truth comes plain (3) or tagged (<answer> 3 </answer>).
    What the rules leave open (`compare` is None: variables, functions, sets) counts as wrong here; `Grader` asks
    math-verify about it, in a process that can be killed.
    """
    stated = stated_text(text)
    return float(stated is not None and compare(stated, true_text(answer)) is True)


def true_text(answer: str) -> str:
    tagged = answer_text(answer)
    return answer if tagged is None else tagged


def compare(stated: str, truth: str) -> bool | None:
    """Whether both say the same; None where the rules cannot tell.

    Numbers are compared by exact value (see `parse_quantity`), choices by letter, and by value where both have one,
    words as `same_words` does; several answers (45° or 135°) in any order; equal texts are equal. A sentence is
    compared by what it states of its subject.
    """
    if len(stated) > MAX_CHARS or len(truth) > MAX_CHARS:
        stated, truth = stated.strip(), truth.strip()
        if len(stated) > MAX_CHARS or len(truth) > MAX_CHARS:
            return stated == truth
    return _compare(stated, truth)


@lru_cache(maxsize=4096)
def _compare(stated: str, truth: str) -> bool | None:
    said, true = stated.split(), truth.split()
    if not said or not true:
        return False
    if said == true:
        return True
    if len(said) == len(true) == 1 and all(word.isascii() and word.isdigit() for word in (*said, *true)):
        return int(said[0]) == int(true[0])  # counting, ten times quicker than what follows
    bare, right = plain(stated), plain(truth)
    verdict = _compare_plain(bare, right)
    if verdict is False and (inner := stated_in(bare)) is not None:
        return _compare_plain(plain(inner), right) is True
    return verdict


def _compare_plain(stated: str, truth: str) -> bool | None:
    picked, right = parse_choice(stated), parse_choice(truth)
    if right is not None and right.letter.isupper():
        if picked is None:
            return bool(right.rest) and _compare_plain(stated, right.rest)
        if picked.letter.upper() != right.letter:
            return False
        return not (picked.rest and right.rest) or _compare_plain(picked.rest, right.rest)
    if picked is not None and picked.rest:
        stated = picked.rest
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
    """Whether each of several answers (45° or 135°) is stated once, in any order, and nothing else."""
    left = list(truth)
    for item in stated:
        match = next((one for one in left if _compare_plain(item, one) is True), None)
        if match is None:
            return False
        left.remove(match)
    return not left


_REMEMBERED = 1024  # answers of a group, and questions asked again, are often alike


class Grader:
    """The accuracy reward with all its layers; `counts` says which one decided how many answers.

    An answer that the symbolic layer cannot decide in its time and memory is wrong, not masked: it was not shown to be
    right, and a policy must not find that a bomb saves it from a zero.
    """

    def __init__(self, reward: RewardConfig) -> None:
        self.without_tag = reward.without_tag
        self.counts: Counter[str] = Counter()
        self.symbolic = SymbolicProcess(answer_cpu_s=reward.answer_cpu_s, memory_mb=reward.memory_mb)
        self._remembered: OrderedDict[tuple[str, str], Outcome] = OrderedDict()

    def accuracy(self, text: str, answer: str) -> float:
        """1.0 or 0.0, for any text."""
        stated = stated_text(text, self.without_tag)
        if stated is None:
            self.counts["untagged"] += 1
            return 0.0
        truth = true_text(answer)
        verdict = compare(stated, truth)
        if verdict is not None:
            self.counts["rules"] += 1
            return float(verdict)
        outcome = self._compare_symbols(plain(stated.strip()), plain(truth.strip()))
        self.counts["symbolic" if outcome in ("right", "wrong") else outcome] += 1
        return float(outcome == "right")

    def _compare_symbols(self, stated: str, truth: str) -> Outcome:
        asked = (stated, truth)
        if asked not in self._remembered:
            self._remembered[asked] = self.symbolic.equal(truth, stated)
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return self._remembered[asked]

    def close(self) -> None:
        self.symbolic.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


Reward: TypeAlias = Callable[[str, str, Grader], float]  # of the completion's text, the true answer, the run's grader


def _accuracy(text: str, answer: str, grader: Grader) -> float:
    return grader.accuracy(text, answer)


def _format(text: str, answer: str, grader: Grader) -> float:
    return format_reward(text)


REWARDS: dict[str, Reward] = {
    "accuracy": _accuracy,
    "format": _format,
}


def score_group(
    group: Group, reward: RewardConfig, grader: Grader, own: Mapping[str, Reward] = MappingProxyType({})
) -> ScoredGroup:
    """accuracy + format_weight * format for each of the G answers, and what a reward of the user's own adds.

    An answer on which a reward function fails gets 0 and is marked invalid; the others of its group keep their rewards.
    """
    functions = {**REWARDS, **own}
    weights = {"accuracy": reward.accuracy_weight, "format": reward.format_weight}
    size = len(group.completions)
    parts = {name: np.zeros(size) for name in functions}
    valid = np.ones(size, dtype=np.bool_)
    before = grader.counts.copy()
    for row, completion in enumerate(group.completions):
        scores = _score(functions, completion.text, group.prompt.answer, grader)
        valid[row] = scores is not None
        for name, value in (scores or {}).items():
            parts[name][row] = value
    rewards = sum((weights.get(name, reward.own_weight) * part for name, part in parts.items()), np.zeros(size))
    return ScoredGroup(group=group, rewards=rewards, parts=parts, valid=valid, graded=dict(grader.counts - before))


def opened(own: CustomReward) -> dict[str, Reward]:
    """By its name, as the others are called."""
    function = own.function()
    return {own.name: lambda text, answer, grader: function(text, answer)}


def _score(functions: Mapping[str, Reward], text: str, answer: str, grader: Grader) -> dict[str, float] | None:
    try:
        scores = {name: float(function(text, answer, grader)) for name, function in functions.items()}
    except GradingFailed:  # no answer's fault: the run must stop and say so
        raise
    # A reward function may come from a user and meets whatever a model wrote: any failure is this answer's alone.
    except Exception:
        return None
    return scores if all(isfinite(value) for value in scores.values()) else None

"""The accuracy reward R_acc of Eq. 1, by rules: exact, in-process and in microseconds."""

from __future__ import annotations

from functools import lru_cache

from othink_ray.rewards.choice import parse_choice
from othink_ray.rewards.closed_form import closed_form
from othink_ray.rewards.notation import is_expression, may_be_number, plain
from othink_ray.rewards.parse import answer_text, stated_text
from othink_ray.rewards.quantity import parse_quantity, same
from othink_ray.rewards.statement import stated_in
from othink_ray.rewards.words import same_words, split_items

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

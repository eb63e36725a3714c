"""The accuracy reward R_acc of Eq. 1."""

from __future__ import annotations

from othink_ray.rewards.parse import answer_text, parse_number


def accuracy(text: str, answer: str) -> float:
    """1.0 if the answer stated in the completion equals the true one, else 0.0.

    Only what stands inside <answer>…</answer> is graded. The truth comes plain (3) or tagged (<answer> 3 </answer>).
    A numeric truth is compared by value, without units; any other, letter by letter but for white space.
    """
    stated = answer_text(text)
    if stated is None:
        return 0.0
    tagged = answer_text(answer)
    truth = answer if tagged is None else tagged
    number = parse_number(truth)
    if number is not None:
        return float(parse_number(stated) == number)
    words = truth.split()
    return float(bool(words) and stated.split() == words)

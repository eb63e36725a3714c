"""Whether each claim of the paper held here: a sentence, our numbers, and a verdict by the interval of a difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from othink_ray.study.paper_numbers import FIG_7, TABLE_1
from othink_ray.study.plan import GR, VC
from othink_ray.study.tables import Tables
from othink_ray.study.values import Value, difference

HELD, NOT_HELD, OPEN, NOT_RUN = "held", "did not hold", "not settled", "not run"
TASKS = {VC: "visual counting", GR: "geometry reasoning"}
METHOD = {"base": "the base model", "grpo": "GRPO", "sft": "SFT", "grpo_d": "GRPO-D"}

Claim = dict[str, Any]


def claims(tables: Tables) -> list[Claim]:
    """Those of the experiments that are part of the study, in the paper's order."""
    chosen = tables.study.experiments
    found: list[Claim] = []
    if "alpha" in chosen:
        found.append(_best_alpha(tables))
    if "beta" in chosen:
        found.append(_rises_then_falls(tables))
    if "same_task" in chosen:
        for task in (VC, GR):
            found += [_same_task(tables, task, other) for other in ("base", "grpo", "sft")]
    if "cross_task" in chosen:
        found += [_cross_task(tables, *compared) for compared in FIG_7]
    return found


def better(a: Value | None, b: Value | None) -> str:
    """Whether a is more than b, as far as the runs can tell."""
    if a is None or b is None:
        return NOT_RUN
    _, low, high = difference(a, b)
    return HELD if low > 0 else NOT_HELD if high < 0 else OPEN


def _same_task(tables: Tables, task: str, other: str) -> Claim:
    ours, theirs = tables.same_task(task, "grpo_d"), tables.same_task(task, other)
    if other == "base" and ours is not None and theirs is not None:
        theirs = _repeated(theirs, len(ours.values))
    return {
        "experiment": "RQ2",
        "claim": f"On {TASKS[task]}, GRPO-D is better than {METHOD[other]}.",
        "paper": f"{TABLE_1[task, 'grpo_d'][0]:.2f} % against {TABLE_1[task, other][0]:.2f} % (2B)",
        "ours": _against(ours, theirs),
        "verdict": better(ours, theirs),
    }


def _cross_task(tables: Tables, train: str, method: str, other: str) -> Claim:
    """A claim about the task that was not trained on; the base model was trained on neither."""
    test, change = GR if train == VC else VC, FIG_7[train, method, other]
    winner, loser = (method, other) if change > 0 else (other, method)
    ours, theirs = tables.cross_task(train, winner), tables.cross_task(train, loser)
    if ours is not None and theirs is not None:
        seeds = max(len(ours.values), len(theirs.values))
        ours, theirs = _repeated(ours, seeds), _repeated(theirs, seeds)
    trained = f"Trained on {TASKS[train]} and tested on {TASKS[test]}"
    return {
        "experiment": "RQ3",
        "claim": f"{trained}, {METHOD[winner]} is better than {METHOD[loser]}.",
        "paper": f"{METHOD[method]} {change:+.2f} % relative to {METHOD[other]}",
        "ours": _against(ours, theirs),
        "verdict": better(ours, theirs),
    }


def _best_alpha(tables: Tables) -> Claim:
    found = {alpha: tables.of_alpha(alpha) for alpha in tables.study.alphas}
    full, none = found.get(1.0), found.get(0.0)
    return {
        "experiment": "RQ1a",
        "claim": "On geometry reasoning, the format reward (alpha = 1) gives a better accuracy than none (alpha = 0).",
        "paper": "Fig. 4; alpha = 1 is the paper's default",
        "ours": _against(full, none),
        "verdict": better(full, none),
    }


def _rises_then_falls(tables: Tables) -> Claim:
    found = {beta: tables.of_beta(beta) for beta in tables.study.betas}
    known = {beta: value for beta, value in found.items() if value is not None}
    claim = "On geometry reasoning, accuracy first rises with a constant KL weight, then falls."
    base = {"experiment": "RQ1b", "claim": claim, "paper": "Fig. 6: a peak inside the range"}
    if len(known) < len(found) or len(found) < 3:
        return base | {"ours": "not run yet", "verdict": NOT_RUN}
    peak = max(known, key=lambda beta: known[beta].mean)
    ends = (min(known), max(known))
    verdicts = [better(known[peak], known[end]) for end in ends]
    verdict = NOT_HELD if peak in ends and better(known[peak], known[_middle(known, ends)]) == HELD else OPEN
    if peak not in ends and verdicts == [HELD, HELD]:
        verdict = HELD
    return base | {
        "ours": f"best at beta = {peak:g}: "
        + ", ".join(f"{100 * known[beta].mean:.1f} % at {beta:g}" for beta in sorted(known)),
        "verdict": verdict,
    }


def _middle(known: dict[float, Value], ends: Sequence[float]) -> float:
    """The best value between the ends."""
    return max((beta for beta in known if beta not in ends), key=lambda beta: known[beta].mean)


def _repeated(value: Value, seeds: int) -> Value:
    """One measurement that holds for every seed, such as the base model's."""
    if len(value.values) == seeds or len(value.values) > 1:
        return value
    return Value(mean=value.mean, lo=value.lo, hi=value.hi, values=value.values * seeds)


def _against(a: Value | None, b: Value | None) -> str:
    if a is None or b is None:
        return "not run yet"
    gap, low, high = difference(a, b)
    return (
        f"{100 * a.mean:.1f} % against {100 * b.mean:.1f} %: {100 * gap:+.1f} points "
        f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {_seeds(len(a.values))})"
    )


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"

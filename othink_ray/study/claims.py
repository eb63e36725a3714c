"""Whether each claim of the paper held here: a sentence, our numbers, and a verdict by the interval of a difference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from othink_ray.study.paper_numbers import FIG_7, TABLE_1
from othink_ray.study.plan import GR, VC
from othink_ray.study.results import Value, difference
from othink_ray.study.tables import Tables

HELD, NOT_HELD, OPEN, NOT_RUN = "held", "did not hold", "not settled", "not run"
SENTENCES = {
    HELD: "It held here: ",
    NOT_HELD: "It did not hold here: ",
    OPEN: "These runs do not settle it: ",
    NOT_RUN: "It was not asked here, or not all of its runs are done.",
}
TASKS = {VC: "visual counting", GR: "geometry reasoning"}
METHOD = {"base": "the base model", "grpo": "GRPO", "sft": "SFT", "grpo_d": "GRPO-D"}

Claim = dict[str, Any]


def claims(tables: Tables) -> list[Claim]:
    """Those of the experiments that are part of the study, in the paper's order."""
    chosen = tables.study.experiments
    found: list[Claim] = []
    if "alpha" in chosen:
        found.append(_format_reward_helps(tables))
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
    _, low, high = difference(*_alike(a, b))
    return HELD if low > 0 else NOT_HELD if high < 0 else OPEN


def _same_task(tables: Tables, task: str, other: str) -> Claim:
    return _compared(
        "RQ2",
        f"On {TASKS[task]}, GRPO-D is better than {METHOD[other]}.",
        f"{TABLE_1[task, 'grpo_d'][0]:.2f} % against {TABLE_1[task, other][0]:.2f} % (2B)",
        tables.same_task(task, "grpo_d"),
        tables.same_task(task, other),
    )


def _cross_task(tables: Tables, train: str, method: str, other: str) -> Claim:
    """A claim about the task that was not trained on; the base model was trained on neither."""
    test, change = GR if train == VC else VC, FIG_7[train, method, other]
    winner, loser = (method, other) if change > 0 else (other, method)
    return _compared(
        "RQ3",
        f"Trained on {TASKS[train]} and tested on {TASKS[test]}, {METHOD[winner]} is better than {METHOD[loser]}.",
        f"{METHOD[method]} {change:+.2f} % relative to {METHOD[other]}",
        tables.cross_task(train, winner),
        tables.cross_task(train, loser),
    )


def _format_reward_helps(tables: Tables) -> Claim:
    return _compared(
        "RQ1a",
        "On geometry reasoning, the format reward (alpha = 1) gives a better accuracy than none (alpha = 0).",
        "Fig. 4; alpha = 1 is the paper's default",
        tables.of_alpha(1.0),
        tables.of_alpha(0.0),
    )


def _rises_then_falls(tables: Tables) -> Claim:
    """It held when the best value lies inside the range and is better than both ends."""
    found = {beta: tables.of_beta(beta) for beta in sorted(tables.study.betas)}
    known = {beta: value for beta, value in found.items() if value is not None}
    claim = "On geometry reasoning, accuracy first rises with a constant KL weight, then falls."
    paper = "Fig. 6: a peak inside the range"
    inner = list(known)[1:-1]
    if len(known) < len(found) or not inner:
        return _told("RQ1b", claim, paper, NOT_RUN, "")
    first, last = min(known), max(known)
    peak = max(inner, key=lambda beta: known[beta].mean)
    over_ends = {better(known[peak], known[first]), better(known[peak], known[last])}
    verdict = HELD if over_ends == {HELD} else NOT_HELD if NOT_HELD in over_ends else OPEN
    return _told("RQ1b", claim, paper, verdict, ", ".join(f"{_percent(known[beta])} at {beta:g}" for beta in known))


def _compared(experiment: str, claim: str, paper: str, winner: Value | None, loser: Value | None) -> Claim:
    if winner is None or loser is None:
        return _told(experiment, claim, paper, NOT_RUN, "")
    winner, loser = _alike(winner, loser)
    gap, low, high = difference(winner, loser)
    ours = (
        f"{_percent(winner)} against {_percent(loser)}, {100 * gap:+.1f} points "
        f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {_seeds(winner)})"
    )
    return _told(experiment, claim, paper, better(winner, loser), ours)


def _told(experiment: str, claim: str, paper: str, verdict: str, ours: str) -> Claim:
    told = SENTENCES[verdict] + ours
    return {"experiment": experiment, "claim": claim, "paper": paper, "ours": told, "verdict": verdict}


def _alike(a: Value, b: Value) -> tuple[Value, Value]:
    """The base model is measured once, and is the same for every seed that it is compared with."""
    if len(a.seeds) == 1 < len(b.seeds):
        return replace(a, seeds=b.seeds, values=a.values * len(b.seeds)), b
    if len(b.seeds) == 1 < len(a.seeds):
        return a, replace(b, seeds=a.seeds, values=b.values * len(a.seeds))
    return a, b


def _percent(value: Value) -> str:
    return f"{100 * value.mean:.1f} %"


def _seeds(value: Value) -> str:
    return "one seed" if len(value.seeds) == 1 else f"{len(value.seeds)} seeds"

"""Judge the paper's claims on our runs: a sentence, our numbers, and a verdict from the interval of a difference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from othink_ray.study.plan import GR, VC
from othink_ray.study.results import SeedMean, difference
from othink_ray.study.tables import FIG_7, TABLE_1, Tables

HELD, NOT_HELD, OPEN, NOT_RUN = "held", "did not hold", "not settled", "not run"
SENTENCES = {
    HELD: "It held here: ",
    NOT_HELD: "It did not hold here: ",
    OPEN: "These runs do not settle it: ",
    NOT_RUN: "Not part of this study, or not all of its runs are done.",
}
TASK_NAMES = {VC: "visual counting", GR: "geometry reasoning"}
METHOD_NAMES = {"base": "the base model", "grpo": "GRPO", "sft": "SFT", "grpo_d": "GRPO-D"}

Claim = dict[str, Any]


def claims(tables: Tables) -> list[Claim]:
    """Return the judged claims of the study's experiments, in the paper's order."""
    experiments = tables.study.experiments
    judged: list[Claim] = []
    if "alpha" in experiments:
        judged.append(_format_reward_helps(tables))
    if "beta" in experiments:
        judged.append(_rises_then_falls(tables))
    if "same_task" in experiments:
        for task in (VC, GR):
            judged += [_same_task(tables, task, other) for other in ("base", "grpo", "sft")]
    if "cross_task" in experiments:
        judged += [_cross_task(tables, *compared) for compared in FIG_7]
    return judged


def better(a: SeedMean | None, b: SeedMean | None) -> str:
    """Return the verdict on a > b: settled if the 95 % interval of a - b excludes 0."""
    if a is None or b is None:
        return NOT_RUN
    _, low, high = difference(*_match_seeds(a, b))
    return HELD if low > 0 else NOT_HELD if high < 0 else OPEN


def _same_task(tables: Tables, task: str, other: str) -> Claim:
    return _compared(
        "RQ2",
        f"On {TASK_NAMES[task]}, GRPO-D is better than {METHOD_NAMES[other]}.",
        f"{TABLE_1[task, 'grpo_d'][0]:.2f} % against {TABLE_1[task, other][0]:.2f} % (2B)",
        tables.same_task(task, "grpo_d"),
        tables.same_task(task, other),
    )


def _cross_task(tables: Tables, train: str, method: str, other: str) -> Claim:
    """Judge a claim about the task that was not trained on; the base model is trained on neither task."""
    test, change = GR if train == VC else VC, FIG_7[train, method, other]
    winner, loser = (method, other) if change > 0 else (other, method)
    return _compared(
        "RQ3",
        f"Trained on {TASK_NAMES[train]} and tested on {TASK_NAMES[test]}, "
        f"{METHOD_NAMES[winner]} is better than {METHOD_NAMES[loser]}.",
        f"{METHOD_NAMES[method]} {change:+.2f} % relative to {METHOD_NAMES[other]}",
        tables.cross_task(train, winner),
        tables.cross_task(train, loser),
    )


def _format_reward_helps(tables: Tables) -> Claim:
    return _compared(
        "RQ1a",
        "On geometry reasoning, the format reward (alpha = 1) gives a better accuracy than no format reward "
        "(alpha = 0).",
        "Fig. 4; alpha = 1 is the paper's default",
        tables.of_alpha(1.0),
        tables.of_alpha(0.0),
    )


def _rises_then_falls(tables: Tables) -> Claim:
    """Judge the rise and fall over beta: it held if the best inner value is better than both ends of the range."""
    swept = {beta: tables.of_beta(beta) for beta in sorted(tables.study.betas)}
    known = {beta: value for beta, value in swept.items() if value is not None}
    claim = "On geometry reasoning, accuracy first rises with a constant KL weight, then falls."
    paper = "Fig. 6: a peak inside the range"
    inner = list(known)[1:-1]
    if len(known) < len(swept) or not inner:
        return _claim("RQ1b", claim, paper, NOT_RUN, "")
    first, last = min(known), max(known)
    peak = max(inner, key=lambda beta: known[beta].mean)
    over_ends = {better(known[peak], known[first]), better(known[peak], known[last])}
    verdict = HELD if over_ends == {HELD} else NOT_HELD if NOT_HELD in over_ends else OPEN
    return _claim("RQ1b", claim, paper, verdict, ", ".join(f"{_percent(known[beta])} at {beta:g}" for beta in known))


def _compared(experiment: str, claim: str, paper: str, winner: SeedMean | None, loser: SeedMean | None) -> Claim:
    if winner is None or loser is None:
        return _claim(experiment, claim, paper, NOT_RUN, "")
    winner, loser = _match_seeds(winner, loser)
    gap, low, high = difference(winner, loser)
    ours = (
        f"{_percent(winner)} against {_percent(loser)}, {100 * gap:+.1f} points "
        f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {_seeds(winner)})"
    )
    return _claim(experiment, claim, paper, better(winner, loser), ours)


def _claim(experiment: str, claim: str, paper: str, verdict: str, ours: str) -> Claim:
    sentence = SENTENCES[verdict] + ours
    return {"experiment": experiment, "claim": claim, "paper": paper, "ours": sentence, "verdict": verdict}


def _match_seeds(a: SeedMean, b: SeedMean) -> tuple[SeedMean, SeedMean]:
    """Repeat a value of a single seed for every seed of the other one: the base model is evaluated only once."""
    if len(a.seeds) == 1 < len(b.seeds):
        return replace(a, seeds=b.seeds, values=a.values * len(b.seeds)), b
    if len(b.seeds) == 1 < len(a.seeds):
        return a, replace(b, seeds=a.seeds, values=b.values * len(a.seeds))
    return a, b


def _percent(value: SeedMean) -> str:
    return f"{100 * value.mean:.1f} %"


def _seeds(value: SeedMean) -> str:
    return "one seed" if len(value.seeds) == 1 else f"{len(value.seeds)} seeds"

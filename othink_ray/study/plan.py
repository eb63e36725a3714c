"""The experiments as runs: each is a list of overrides, and one that two experiments share is there once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from othink_ray.config.schema import StudyConfig, StudyTask

VC, GR = "VC", "GR"  # the paper's names: visual counting, geometry reasoning
METHODS = ("grpo", "sft", "grpo_d")
ALPHA, BETA = "algo.reward.format_weight", "algo.kl.beta_min"
OWN = ("mode", "study", "run.dir", "run.resume")  # keys that mean the study itself, not its runs


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """One run of the list, with what tells it from the others."""

    name: str
    experiments: tuple[str, ...]
    task: str  # VC or GR
    method: str  # one of METHODS
    seed: int
    alpha: float
    beta: float | None  # of a constant schedule
    overrides: tuple[str, ...]


def planned(study: StudyConfig, extra: Sequence[str]) -> list[StudyRun]:
    """All runs but the base model's, in the order in which they are made; `extra` overrides what is the same in all."""
    found: dict[tuple[object, ...], StudyRun] = {}
    for run in _wanted(study, extra):
        key = (run.task, run.method, run.seed, run.alpha, run.beta)
        shared = found.setdefault(key, run)
        experiments = tuple(dict.fromkeys((*shared.experiments, *run.experiments)))
        found[key] = replace(shared, experiments=experiments)
    return list(found.values())


def compared_seeds(study: StudyConfig) -> range:
    """Of each method where methods are compared."""
    return range(study.seeds if study.size == "full" else study.small_seeds)


def swept_seeds(study: StudyConfig) -> range:
    """Of each value in a sweep."""
    return range(study.sweep_seeds if study.size == "full" else study.small_seeds)


def base_overrides(study: StudyConfig, extra: Sequence[str]) -> tuple[str, ...]:
    """The run that makes the base model."""
    return merged(study.base, [one for one in extra if key_of(one) not in map(key_of, study.base)])


def _wanted(study: StudyConfig, extra: Sequence[str]) -> Iterator[StudyRun]:
    """Every run of every experiment, the same one possibly several times."""
    compared, swept = compared_seeds(study), swept_seeds(study)
    for experiment in study.experiments:
        if experiment in ("same_task", "cross_task"):
            for seed in compared:
                for task in (VC, GR):
                    for method in METHODS:
                        yield _run(study, extra, experiment, task, method, seed)
        elif experiment == "curves":
            for seed in compared:
                for method in ("sft", "grpo"):
                    yield _run(study, extra, experiment, GR, method, seed)
        elif experiment == "alpha":
            for seed in swept:
                for alpha in study.alphas:
                    yield _run(study, extra, experiment, GR, "grpo", seed, alpha=alpha)
        else:
            assert experiment == "beta", "config.check: no other experiment"
            for seed in swept:
                for beta in study.betas:
                    yield _run(study, extra, experiment, GR, "grpo", seed, beta=beta)


def _run(
    study: StudyConfig,
    extra: Sequence[str],
    experiment: str,
    task: str,
    method: str,
    seed: int,
    *,
    alpha: float = 1.0,
    beta: float | None = None,
) -> StudyRun:
    own, other = (study.counting, study.geometry) if task == VC else (study.geometry, study.counting)
    if method == "grpo" and beta is None:
        beta = own_beta(own)
    name = f"{task}-{method}"
    if experiment in ("alpha", "beta"):
        name += f"-alpha{alpha:g}-beta{beta:g}"
    swept = [f"{ALPHA}={alpha:g}"] if method != "sft" else []
    swept += [f"{BETA}={beta:g}"] if beta is not None else []
    own_keys = [f"data={own.data}", f"eval.also=[{other.data}]", f"train.seed={seed}", *swept]
    return StudyRun(
        name=f"{name}-seed{seed}",
        experiments=(experiment,),
        task=task,
        method=method,
        seed=seed,
        alpha=alpha,
        beta=beta,
        overrides=merged(
            study.all, own.all, study.small if study.size == "small" else (), extra, getattr(own, method), own_keys
        ),
    )


def own_beta(task: StudyTask) -> float:
    """The constant KL weight of the task's GRPO baseline."""
    [value] = [one.partition("=")[2] for one in task.grpo if key_of(one) == BETA]
    return float(value)


def merged(*parts: Iterable[str]) -> tuple[str, ...]:
    """All overrides; where a key is set twice, the last one holds."""
    last: dict[str, str] = {}
    for one in (one for part in parts for one in part):
        last.pop(key_of(one), None)
        last[key_of(one)] = one
    return tuple(last.values())


def key_of(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def for_runs(overrides: Sequence[str]) -> list[str]:
    """Those overrides of the study's command that its runs get."""
    return [one for one in overrides if key_of(one) not in OWN and not key_of(one).startswith("study.")]

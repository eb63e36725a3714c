"""Plan the experiments as runs: each run is a list of config overrides; a run shared by experiments is planned once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from othink_ray.config.schema import StudyConfig, StudyTask

VC, GR = "VC", "GR"  # the paper's names: visual counting, geometry reasoning
METHODS = ("grpo", "sft", "grpo_d")
ALPHA, BETA = "algo.reward.format_weight", "algo.kl.beta_min"
STUDY_KEYS = ("mode", "study", "run.dir", "run.resume")  # keys that configure the study, not its runs


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """One planned run and the settings that distinguish it from the others."""

    name: str
    experiments: tuple[str, ...]
    task: str  # VC or GR
    method: str  # one of METHODS
    seed: int
    alpha: float
    beta: float | None  # constant KL weight; None under another schedule
    overrides: tuple[str, ...]


def planned(study: StudyConfig, extra: Sequence[str]) -> list[StudyRun]:
    """Return all runs except the base model's in execution order; `extra` overrides the settings common to all runs."""
    runs: dict[tuple[object, ...], StudyRun] = {}
    for run in _all_runs(study, extra):
        key = (run.task, run.method, run.seed, run.alpha, run.beta)
        shared = runs.setdefault(key, run)
        experiments = tuple(dict.fromkeys((*shared.experiments, *run.experiments)))
        runs[key] = replace(shared, experiments=experiments)
    return list(runs.values())


def compared_seeds(study: StudyConfig) -> range:
    """Return the seeds of each method in comparisons of methods; one with size=small, a rehearsal."""
    return range(study.seeds if study.size == "full" else 1)


def swept_seeds(study: StudyConfig) -> range:
    """Return the seeds of each value in a sweep; one with size=small."""
    return range(study.sweep_seeds if study.size == "full" else 1)


def base_overrides(study: StudyConfig, extra: Sequence[str]) -> tuple[str, ...]:
    """Return the overrides of the run that trains the base model."""
    return merged(study.base, [override for override in extra if key_of(override) not in map(key_of, study.base)])


def _all_runs(study: StudyConfig, extra: Sequence[str]) -> Iterator[StudyRun]:
    """Yield every run of every experiment; shared runs repeat."""
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
            assert experiment == "beta", "config.rules rejects other experiments"
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
    trained, other = (study.counting, study.geometry) if task == VC else (study.geometry, study.counting)
    if method == "grpo" and beta is None:
        beta = baseline_beta(trained)
    name = f"{task}-{method}"
    if experiment in ("alpha", "beta"):
        name += f"-alpha{alpha:g}-beta{beta:g}"
    swept = [f"{ALPHA}={alpha:g}"] if method != "sft" else []
    swept += [f"{BETA}={beta:g}"] if beta is not None else []
    distinguishing = [f"data={trained.data}", f"eval.also=[{other.data}]", f"train.seed={seed}", *swept]
    return StudyRun(
        name=f"{name}-seed{seed}",
        experiments=(experiment,),
        task=task,
        method=method,
        seed=seed,
        alpha=alpha,
        beta=beta,
        overrides=merged(
            study.all,
            trained.all,
            study.small if study.size == "small" else (),
            extra,
            getattr(trained, method),
            distinguishing,
        ),
    )


def baseline_beta(task: StudyTask) -> float:
    """Return the constant KL weight of the task's GRPO baseline."""
    [value] = [override.partition("=")[2] for override in task.grpo if key_of(override) == BETA]
    return float(value)


def merged(*parts: Iterable[str]) -> tuple[str, ...]:
    """Concatenate overrides; the last one of a key wins."""
    last: dict[str, str] = {}
    for override in (override for part in parts for override in part):
        last.pop(key_of(override), None)
        last[key_of(override)] = override
    return tuple(last.values())


def key_of(override: str) -> str:
    """Return the key of a Hydra override: `a.b` for a.b=c and +a.b=c."""
    return override.lstrip("+").partition("=")[0]


def for_runs(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of the study's command that are passed on to its runs."""
    return [
        override
        for override in overrides
        if key_of(override) not in STUDY_KEYS and not key_of(override).startswith("study.")
    ]

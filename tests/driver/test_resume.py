"""A resumed run has the KL weights, prompts and metrics of an uninterrupted one, with every schedule."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from othink_ray.config.load import load, to_yaml
from othink_ray.config.schema import Config
from othink_ray.data import open_source
from othink_ray.data.prompt_stream import PromptStream
from othink_ray.driver import checkpoint
from othink_ray.driver.callbacks import GRPOCallbacks
from othink_ray.driver.checkpoint import Checkpoints
from othink_ray.driver.console import Console
from othink_ray.driver.evaluate import EvalSet, Evaluation
from othink_ray.driver.metrics import RunRecords
from othink_ray.driver.stopping import StopRequest
from othink_ray.driver.training import open_loop
from othink_ray.runtime.monitoring import Incidents
from othink_ray.types import Audit, Completion, Group, Prompt, ScoredGroup, TrainState, UpdateRequest, UpdateStats
from tests.driver.fakes import stats_of

STEPS = 6


@dataclass
class FakeWorkers:
    """Answers depend only on prompt and version, and the KL on the betas so far."""

    version: int = -1
    drift: float = 0.0
    requested: dict[int, list[str]] = field(default_factory=dict)  # by step

    def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Group]:
        self.requested.setdefault(step, []).extend(prompt.id for prompt in prompts)
        return self._answers(prompts)

    def _answers(self, prompts: Sequence[Prompt]) -> Iterator[Group]:
        for prompt in prompts:
            completion = Completion(
                token_ids=np.arange(3), sampler_logprobs=np.zeros(3, np.float32), text="", finish="stop"
            )
            yield Group(
                prompt=prompt,
                prompt_token_ids=np.arange(2),
                completions=(completion,) * 4,
                version=self.version,
            )

    def score(self, groups: Iterable[Group]) -> list[ScoredGroup]:
        scored = []
        for group in groups:
            rng = np.random.default_rng([group.version, *group.prompt.id.encode()])
            correct = (rng.random(len(group.completions)) < 0.2 + 0.1 * group.version).astype(np.float64)
            scored.append(
                ScoredGroup(
                    group=group,
                    rewards=correct,
                    parts={"accuracy": correct, "format": np.ones_like(correct)},
                    valid=np.ones(len(correct), dtype=np.bool_),
                )
            )
        return scored

    def record_lengths(self, scored_groups: Sequence[ScoredGroup]) -> None: ...

    def sleep(self) -> None: ...

    def begin_update(self, request: UpdateRequest) -> float:
        return request.settings.beta

    def begin_push(self) -> None: ...

    def prefetch(self, prompts: Sequence[Prompt]) -> None: ...

    def finish_update(self, update: float) -> UpdateStats:
        self.drift += 0.02 - 0.2 * update
        return stats_of(kl_mean=self.drift)

    def prefetch_update(self, request: UpdateRequest) -> None: ...

    def push(self, version: int) -> Audit:
        self.version = version
        return Audit(version=version, gap_mean=0.0, gap_max=0.0, tokens=1)

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        return self.score(self._answers(prompts))

    def save(self, folder: Path) -> None:
        (folder / "drift").write_text(repr(self.drift))

    def save_is_written(self) -> bool:
        return True

    def finish_save(self) -> dict[str, str]:
        return {}


def run(config: Config, run_dir: Path, workers: FakeWorkers, state: TrainState, until: int) -> list[dict[str, float]]:
    """Run the steps from `state` to `until` with real callbacks; return the lines of metrics.jsonl."""
    stream = PromptStream(open_source(config.data, "train"), seed=0, on_bad_row="stop", position=state.data_position)
    eval_set = EvalSet(name="counting", prompts=[open_source(config.data, "test").prompt(0)], bad_rows=[])
    with (
        RunRecords(
            run_dir,
            wandb=config.wandb,
            config_yaml=to_yaml(config),
            environment={},
            log=pytest.fail,
            resume_step=state.step - 1,
        ) as records,
        Console(io.StringIO()) as console,
        open_loop(config) as loop,
    ):
        loop(
            workers,
            stream,
            path="",
            steps=range(state.step, until),
            schedule_state=state.schedule_state,
            callbacks=callbacks_of(config, run_dir, workers, stream, eval_set, records, console, state),
        )
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def callbacks_of(
    config: Config,
    run_dir: Path,
    workers: FakeWorkers,
    stream: PromptStream,
    eval_set: EvalSet,
    records: RunRecords,
    console: Console,
    state: TrainState,
) -> GRPOCallbacks:
    checkpoints = Checkpoints(run_dir, workers, keep_last=9, keep_best=False, log=console.say)
    return GRPOCallbacks(
        config,
        workers,
        stream,
        [eval_set],
        records,
        lambda numbers: None,
        console,
        state.before,
        checkpoints,
        Incidents(0, console.say),
        StopRequest(),
    )


@pytest.mark.parametrize("algo", ["grpo_d", "dapo"])
@pytest.mark.parametrize("schedule", ["paper", "target", "accuracy"])
def test_a_resumed_run_has_the_betas_of_an_uninterrupted_one(tmp_path: Path, schedule: str, algo: str) -> None:
    overrides = [
        f"algo={algo}",
        f"algo.kl.schedule={schedule}",
        "algo.kl.beta_min=0.04",
        "algo.kl.beta_max=0.1",
        f"train.steps={STEPS}",
        "train.prompts_per_step=4",
        "train.checkpoint_every=3",
        "eval.every=0",
    ]
    config = load([*overrides, f"run.dir={tmp_path / 'whole'}"])
    whole = run(config, tmp_path / "whole", FakeWorkers(), checkpoint.fresh(0), STEPS)
    betas = [line["kl/beta"] for line in whole]
    assert len(set(betas)) > 3

    folder = tmp_path / "whole" / "checkpoints" / "step_3"
    state = checkpoint.read(folder, 0)
    assert bool(state.schedule_state) == (schedule != "paper")
    config = load([*overrides, f"run.dir={tmp_path / 'rest'}"])
    rest = run(config, tmp_path / "rest", FakeWorkers(drift=float((folder / "drift").read_text())), state, STEPS)
    assert [line["step"] for line in rest] == [3, 4, 5]
    assert [line["kl/beta"] for line in rest] == betas[3:]
    for name in ("reward/mean", "groups/asked", "kl/mean"):
        assert [line[name] for line in rest] == [line[name] for line in whole[3:]]


@pytest.mark.parametrize("algo", ["grpo_d", "dapo"])
def test_a_resumed_overlapped_run_repeats_prefetched_prompts(tmp_path: Path, algo: str) -> None:
    overrides = [
        *(f"algo={algo}", f"train.steps={STEPS}", "train.prompts_per_step=4", "train.checkpoint_every=3"),
        *("eval.every=0", "train.overlap=true"),
    ]
    whole, rest = FakeWorkers(), FakeWorkers()
    run(load([*overrides, f"run.dir={tmp_path / 'whole'}"]), tmp_path / "whole", whole, checkpoint.fresh(0), STEPS)
    state = checkpoint.read(tmp_path / "whole" / "checkpoints" / "step_3", 0)
    lines = run(load([*overrides, f"run.dir={tmp_path / 'rest'}"]), tmp_path / "rest", rest, state, STEPS)
    assert rest.requested.keys() == {3, 4, 5}
    assert rest.requested[3][:4] == whole.requested[3][:4]
    assert [line["sampler/staleness"] for line in lines] == [0, 1, 1]
    if algo == "grpo_d":
        assert rest.requested == {step: whole.requested[step] for step in (3, 4, 5)}


def test_a_run_stopped_after_its_last_step_is_evaluated(tmp_path: Path) -> None:
    config = load([f"train.steps={STEPS}", "train.prompts_per_step=4", f"run.dir={tmp_path}"])
    run(config, tmp_path, FakeWorkers(), checkpoint.fresh(0), STEPS)
    state = checkpoint.read(tmp_path / "checkpoints" / f"step_{STEPS}", 0)
    eval_set = EvalSet(name="counting", prompts=[open_source(config.data, "test").prompt(0)], bad_rows=[])
    stream = PromptStream(open_source(config.data, "train"), seed=0, on_bad_row="stop")
    with (
        RunRecords(
            tmp_path, wandb=config.wandb, config_yaml="", environment={}, log=pytest.fail, resume_step=STEPS - 1
        ) as records,
        Console(io.StringIO()) as console,
    ):
        callbacks = callbacks_of(
            config, tmp_path, FakeWorkers(version=STEPS), stream, eval_set, records, console, state
        )
        callbacks.on_start(STEPS)
        assert callbacks.before == {"counting": Evaluation(**state.before["counting"])}
        assert callbacks.after.keys() == {"counting"}

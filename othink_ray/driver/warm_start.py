"""The embedded base model: made here, taught to a middling skill on the real learner, and kept for the next run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from othink_ray.config.model_rules import base_model_folder, model_folder
from othink_ray.config.schema import Config, DataConfig
from othink_ray.core.rates import learning_rate
from othink_ray.data import PromptStream, open_training, worked_answer
from othink_ray.driver.console import Console
from othink_ray.driver.loop import Step, train
from othink_ray.driver.supervised import NO_KL, Class, supervised

_TOKENIZER_ROWS = 256


class Classroom(Protocol):
    """A learner with its teacher, for one model folder."""

    @property
    def students(self) -> Class: ...

    @property
    def learner(self) -> Exports: ...


class Exports(Protocol):
    def export(self, folder: Path) -> None: ...


OpenClassroom = Callable[[Config, Path, Callable[[str], None]], AbstractContextManager[Classroom]]


def base_model(config: Config, console: Console, open_classroom: OpenClassroom) -> str:
    """The Hugging Face folder or hub name to start from."""
    if config.model.path is not None:
        return model_folder(config.model.path)
    return str(warm_started(config, console, open_classroom))


def warm_started(config: Config, console: Console, open_classroom: OpenClassroom) -> Path:
    """The base model's folder; made and taught first where no earlier run has done so."""
    folder = base_model_folder(config)
    if (folder / "config.json").is_file():
        console.say(f"base model: {folder} (kept from an earlier run)")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".warming-") as name:
        untaught, taught = Path(name) / "untaught", Path(name) / "taught"
        with console.phase("making the tiny model"):
            _build(config, untaught)
        assert config.model.tiny is not None
        if config.model.tiny.warm_steps:
            with console.phase("warm start: the tiny model learns to answer, by supervised fine-tuning"):
                _teach(config, untaught, taught, console, open_classroom)
        shutil.rmtree(folder, ignore_errors=True)
        (taught if taught.is_dir() else untaught).rename(folder)
    console.say(f"base model: {folder}")
    return folder


def _build(config: Config, folder: Path) -> None:
    from othink_ray.families.tiny import build_tiny

    texts: list[str] = []
    for prompt in _lessons(config.data, config).take(_TOKENIZER_ROWS):
        texts += [message.text for message in prompt.messages] + [worked_answer(prompt)]
    build_tiny(folder, config.model, texts)


def _lessons(data: DataConfig, config: Config) -> PromptStream:
    assert config.model.tiny is not None
    return PromptStream(open_training(data), seed=config.model.tiny.seed, on_bad_row=data.on_bad_row)


def _teach(config: Config, untaught: Path, taught: Path, console: Console, open_classroom: OpenClassroom) -> None:
    tiny = config.model.tiny
    assert tiny is not None
    steps = tiny.warm_steps
    few = replace(config.data, train=replace(config.data.train, size=tiny.warm_questions))
    whole = replace(config.learner, freeze="none", lora=replace(config.learner.lora, rank=0))
    thinking = replace(config, mode="sft", sft=replace(config.sft, reasoning=True), learner=whole)
    with open_classroom(thinking, untaught, console.say) as room:
        train(
            room.students,
            _lessons(few, config),
            steps=range(steps),
            recipe=supervised(tiny.warm_batch),
            schedule=NO_KL,
            schedule_state={},
            # To 0, so that how much it knows does not hang on the noise of the last steps.
            lr=lambda step: learning_rate("linear", step, steps, tiny.warm_lr),
            journal=_Progress(console, steps),
        )
        room.learner.export(taught)


class _Progress:
    """Watches the lessons."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps = console, steps

    def begin(self, step: int) -> None:
        self.console.progress(step, self.steps)

    def step(self, seen: Step) -> None:
        self.console.progress(seen.step + 1, self.steps, f"loss {seen.stats.loss:.3f}")

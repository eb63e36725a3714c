"""The embedded base model: made here, taught to a middling skill on the real learner, and kept for the next run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from othink_ray.config.model_rules import base_model_folder, model_folder
from othink_ray.config.schema import Config, DataConfig, LearnerConfig
from othink_ray.core.lr_schedule import learning_rate
from othink_ray.data import PromptStream, open_training, worked_answer
from othink_ray.driver.console import Console
from othink_ray.driver.loop import Step, train
from othink_ray.driver.sft import NO_KL, Class, supervised

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
    make = _make_tiny if config.model.smol is None else _make_smol
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".warming-") as name:
        made = make(config, Path(name), console, open_classroom)
        shutil.rmtree(folder, ignore_errors=True)
        made.chmod(0o700)  # as a run's own folder
        made.rename(folder)
    console.say(f"base model: {folder}")
    return folder


def _make_tiny(config: Config, place: Path, console: Console, open_classroom: OpenClassroom) -> Path:
    """The embedded model, taught to a middling skill at the run's own task."""
    tiny = config.model.tiny
    assert tiny is not None
    with console.phase("making the tiny model"):
        _build(config, place / "untaught")
    if not tiny.warm_steps:
        return place / "untaught"
    lessons = _Lessons(
        questions=tiny.warm_questions,
        steps=tiny.warm_steps,
        batch=tiny.warm_batch,
        lr=tiny.warm_lr,
        reasoning=tiny.warm_reasoning,
    )
    with console.phase("warm start: the tiny model learns to answer, by supervised fine-tuning"):
        whole = replace(config, learner=_all_trained(config.learner))
        _teach(whole, place / "untaught", place / "taught", lessons, console, open_classroom)
    return place / "taught"


def _make_smol(config: Config, place: Path, console: Console, open_classroom: OpenClassroom) -> Path:
    """The pretrained language model with a tower that has learned to see where that is cheap: in the embedded model."""
    from othink_ray.families.smol import build_smol

    smol = config.model.smol
    assert smol is not None
    eyes = replace(config, model=replace(config.model, name=f"{config.model.name}-eyes", smol=None))
    seeing = warm_started(eyes, console, open_classroom)
    with console.phase(f"fetching {smol.weights}, and putting the vision tower before it"):
        build_smol(place / "untaught", config.model, seeing)
    if not smol.warm_steps:
        return place / "untaught"
    lessons = _Lessons(
        questions=config.data.train.size,
        steps=smol.warm_steps,
        batch=smol.warm_batch,
        lr=smol.warm_lr,
        reasoning=True,
    )
    learner = replace(_all_trained(config.learner), freeze="vision", projector_lr_scale=smol.warm_projector_scale)
    with console.phase("warm start: the language model learns what the tower sees, by supervised fine-tuning"):
        taught = replace(config, learner=learner)
        _teach(taught, place / "untaught", place / "taught", lessons, console, open_classroom)
    return place / "taught"


def _all_trained(learner: LearnerConfig) -> LearnerConfig:
    """Base models learn with all of their weights at one rate, whatever the run trains of them."""
    lora = replace(learner.lora, rank=0)
    return replace(learner, freeze="none", lora=lora, vision_lr_scale=1.0, projector_lr_scale=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lessons:
    """Supervised fine-tuning of a base model."""

    questions: int | None  # the first so many of the training questions, again and again; None: all
    steps: int
    batch: int
    lr: float  # falls to 0
    reasoning: bool  # whether the demonstrations think before they answer


def _build(config: Config, folder: Path) -> None:
    from othink_ray.families.tiny import build_tiny

    texts: list[str] = []
    for prompt in _training(config.data, config).take(_TOKENIZER_ROWS):
        texts += [message.text for message in prompt.messages] + [worked_answer(prompt)]
    build_tiny(folder, config.model, texts)


def _training(data: DataConfig, config: Config) -> PromptStream:
    assert config.model.tiny is not None
    return PromptStream(open_training(data), seed=config.model.tiny.seed, on_bad_row=data.on_bad_row)


def _teach(
    config: Config, untaught: Path, taught: Path, lessons: _Lessons, console: Console, open_classroom: OpenClassroom
) -> None:
    few = _training(replace(config.data, train=replace(config.data.train, size=lessons.questions)), config)
    shown = replace(config, mode="sft", sft=replace(config.sft, reasoning=lessons.reasoning))
    with open_classroom(shown, untaught, console.say) as room:
        train(
            room.students,
            few,
            steps=range(lessons.steps),
            recipe=supervised(lessons.batch),
            schedule=NO_KL,
            schedule_state={},
            # To 0, so that how much it knows does not hang on the noise of the last steps.
            lr=lambda step: learning_rate("linear", step, lessons.steps, lessons.lr),
            journal=_Progress(console, lessons.steps),
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

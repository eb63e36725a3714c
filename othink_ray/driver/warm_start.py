"""The built-in base model: created, warm-started by SFT to a medium accuracy, and cached for later runs."""

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
from othink_ray.driver.sft import DemonstrationSource, SFTLearner, SFTStepRecord, fine_tune

_TOKENIZER_PROMPTS = 256


class ExportingLearner(SFTLearner, Protocol):
    """A learner that can write its model as a Hugging Face folder."""

    def export(self, folder: Path) -> None: ...


class OpenedSFT(Protocol):
    """A learner with the model in one folder, and demonstrations tokenized for it."""

    @property
    def demonstrations(self) -> DemonstrationSource: ...

    @property
    def learner(self) -> ExportingLearner: ...


OpenSFT = Callable[[Config, Path, Callable[[str], None]], AbstractContextManager[OpenedSFT]]


def base_model(config: Config, console: Console, open_sft: OpenSFT) -> str:
    """Return the Hugging Face folder or hub name of the model to start from."""
    if config.model.path is not None:
        return model_folder(config.model.path)
    return str(warm_started_model(config, console, open_sft))


def warm_started_model(config: Config, console: Console, open_sft: OpenSFT) -> Path:
    """Return the folder of the base model; create and warm-start it unless an earlier run has."""
    folder = base_model_folder(config)
    if (folder / "config.json").is_file():
        console.say(f"base model: {folder} (cached by an earlier run)")
        return folder
    make = _make_tiny if config.model.smol is None else _make_smol
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".warming-") as name:
        created = make(config, Path(name), console, open_sft)
        shutil.rmtree(folder, ignore_errors=True)
        created.chmod(0o700)  # private, like a run's folder
        created.rename(folder)
    console.say(f"base model: {folder}")
    return folder


def _make_tiny(config: Config, work_dir: Path, console: Console, open_sft: OpenSFT) -> Path:
    """Create the built-in tiny model and warm-start it on the run's task."""
    tiny = config.model.tiny
    assert tiny is not None
    with console.phase("creating the tiny model"):
        _build(config, work_dir / "initial")
    if not tiny.warm_steps:
        return work_dir / "initial"
    plan = _WarmStart(
        questions=tiny.warm_questions,
        steps=tiny.warm_steps,
        batch=tiny.warm_batch,
        lr=tiny.warm_lr,
        reasoning=tiny.warm_reasoning,
    )
    with console.phase("warm start: supervised fine-tuning of the tiny model"):
        full = replace(config, learner=_train_all_weights(config.learner))
        _fine_tune(full, work_dir / "initial", work_dir / "trained", plan, console, open_sft)
    return work_dir / "trained"


def _make_smol(config: Config, work_dir: Path, console: Console, open_sft: OpenSFT) -> Path:
    """Join a pretrained language model with the vision tower of a tiny model, in which training it is cheap."""
    from othink_ray.families.smol import build_smol

    smol = config.model.smol
    assert smol is not None
    tower_config = replace(config, model=replace(config.model, name=f"{config.model.name}-eyes", smol=None))
    tower_model = warm_started_model(tower_config, console, open_sft)
    with console.phase(f"downloading {smol.weights} and joining it with the vision tower"):
        build_smol(work_dir / "initial", config.model, tower_model)
    if not smol.warm_steps:
        return work_dir / "initial"
    plan = _WarmStart(
        questions=config.data.train.size,
        steps=smol.warm_steps,
        batch=smol.warm_batch,
        lr=smol.warm_lr,
        reasoning=True,
    )
    learner = replace(_train_all_weights(config.learner), freeze="vision", projector_lr_scale=smol.warm_projector_scale)
    with console.phase("warm start: supervised fine-tuning of the language model and the projector"):
        frozen_tower = replace(config, learner=learner)
        _fine_tune(frozen_tower, work_dir / "initial", work_dir / "trained", plan, console, open_sft)
    return work_dir / "trained"


def _train_all_weights(learner: LearnerConfig) -> LearnerConfig:
    """Return settings that train all weights at one learning rate, whatever the run itself trains."""
    lora = replace(learner.lora, rank=0)
    return replace(learner, freeze="none", lora=lora, vision_lr_scale=1.0, projector_lr_scale=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _WarmStart:
    """Settings of the supervised fine-tuning of a base model."""

    questions: int | None  # number of training questions, repeated as needed; None: all
    steps: int
    batch: int
    lr: float  # initial learning rate, decays linearly to 0
    reasoning: bool  # whether the demonstrations contain reasoning


def _build(config: Config, folder: Path) -> None:
    from othink_ray.families.tiny import build_tiny

    texts: list[str] = []
    for prompt in _training_stream(config.data, config).take(_TOKENIZER_PROMPTS):
        texts += [message.text for message in prompt.messages] + [worked_answer(prompt)]
    build_tiny(folder, config.model, texts)


def _training_stream(data: DataConfig, config: Config) -> PromptStream:
    assert config.model.tiny is not None
    return PromptStream(open_training(data), seed=config.model.tiny.seed, on_bad_row=data.on_bad_row)


def _fine_tune(
    config: Config, initial: Path, trained: Path, plan: _WarmStart, console: Console, open_sft: OpenSFT
) -> None:
    stream = _training_stream(replace(config.data, train=replace(config.data.train, size=plan.questions)), config)
    sft_config = replace(config, mode="sft", sft=replace(config.sft, reasoning=plan.reasoning))
    with open_sft(sft_config, initial, console.say) as opened:
        fine_tune(
            opened.learner,
            opened.demonstrations,
            stream,
            steps=range(plan.steps),
            batch_size=plan.batch,
            # Decays to 0, so that the final accuracy does not depend on the noise of the last steps.
            lr=lambda step: learning_rate("linear", step, plan.steps, plan.lr),
            callbacks=_Progress(console, plan.steps),
        )
        opened.learner.export(trained)


class _Progress:
    """Callbacks that show the progress of the warm start."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps = console, steps

    def on_start(self, step: int) -> None:
        self.console.progress(step, self.steps)

    def on_step(self, record: SFTStepRecord) -> None:
        self.console.progress(record.step + 1, self.steps, f"loss {record.stats.loss:.3f}")

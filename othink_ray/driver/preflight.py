"""mode=check: inspect data, model files, disk, memory and idle GPUs before any actor starts."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from othink_ray.config.errors import Problem, broken
from othink_ray.config.model_rules import base_model_folder, model_folder
from othink_ray.config.rules import colocated
from othink_ray.config.schema import Config
from othink_ray.data import BadRow, PromptStream, SourceError, Split, open_source, open_training
from othink_ray.runtime.bundles import all_bundles, describe
from othink_ray.types import Prompt

if TYPE_CHECKING:
    from othink_ray.families.base import Family

_MIN_BATCH = 0.25  # fraction of rollout.max_num_seqs: in a smaller batch a GPU reads all weights for few tokens
_GPUS_PER_NODE = 8
_ROWS_CHECKED = 32  # of each split
_BYTES = {"float32": 4, "bfloat16": 2}
_THIS_MACHINE = "this machine"
_LIMITS = {  # of a question, with the remedy if all questions break it
    "rollout.max_images": "Raise rollout.max_images.",
    "rollout.max_model_len": "Raise rollout.max_model_len, or lower rollout.max_tokens or model.max_pixels.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightReport:
    """Findings, one text for each label, and the problems that prevent the run."""

    lines: dict[str, str]
    problems: Sequence[Problem]


def preflight(config: Config) -> PreflightReport:
    """Return a report on a sample of the data, the model's files and the resources of a run; nothing is started."""
    lines: dict[str, str] = {}
    problems: list[Problem] = []
    samples: list[Prompt] = []
    for split in ("train", "test"):
        try:
            lines[f"data.{split}"], found = _sample(config, split)
            samples += found
        except SourceError as error:
            problems.append(Problem(subject=f"data.{split}", rule=str(error), remedy="See docs/bad_inputs.md."))
    if config.cluster.address is None:
        bundles = all_bundles(config.learner, config.rollout)
        lines["placement"] = describe(bundles, [_THIS_MACHINE] * len(bundles), driver=_THIS_MACHINE)
    if idle := idle_gpus(config):
        lines["idle GPUs"] = "\n    ".join(idle)
    folder = _folder(config)
    if folder is not None:
        weights = _weights_of(folder)
        if weights is None:
            rule = f"{folder} holds no *.safetensors file; other formats can run code when they are loaded"
            problems.append(Problem(subject="model.path", rule=rule, remedy="Save the model with safetensors."))
        else:
            found_lines, found_problems = _model(config, folder, weights, samples)
            lines |= found_lines
            problems += found_problems
    else:
        lines["model files"] = _no_model_files(config.model.path)
    return PreflightReport(lines=lines, problems=problems)


def idle_gpus(config: Config) -> list[str]:
    """Return one line for each cause of idle GPUs, with the setting to change; nothing on CPUs."""
    rollout, learner, train = config.rollout, config.learner, config.train
    if rollout.gpus_per_actor <= 0 or learner.gpus_per_rank <= 0:
        return []
    findings = []
    engines, ranks = rollout.num_actors * rollout.gpus_per_actor, learner.world_size * learner.gpus_per_rank
    if not colocated(learner, rollout) and not train.overlap:
        findings.append(
            f"the engines' {engines:g} GPUs are idle during updates, and the learner's {ranks:g} during generation: "
            "train.overlap=true overlaps the two"
        )
    batch = train.prompts_per_step * config.algo.group_size / rollout.num_actors
    if batch < _MIN_BATCH * rollout.max_num_seqs:
        findings.append(
            f"an engine samples {batch:g} answers per step, and can batch {rollout.max_num_seqs} "
            "(rollout.max_num_seqs): raise train.prompts_per_step, or lower rollout.num_actors"
        )
    if train.prompts_per_step < rollout.num_actors:
        findings.append(
            f"{rollout.num_actors - train.prompts_per_step} engines get no prompt: train.prompts_per_step = "
            f"{train.prompts_per_step}, rollout.num_actors = {rollout.num_actors}: raise the one, or lower the other"
        )
    if learner.zero_stage == 3 and learner.world_size > _GPUS_PER_NODE:
        findings.append(
            f"ZeRO-3 gathers the weights of {learner.world_size} ranks across nodes in every pass: "
            "learner.zero_stage=2 keeps a copy on each rank, if it fits"
        )
    return findings


def _sample(config: Config, split: Split) -> tuple[str, list[Prompt]]:
    source = open_training(config.data) if split == "train" else open_source(config.data, split)
    stream = PromptStream(source, seed=config.train.seed, on_bad_row="drop")
    rows = len(source) if hasattr(source, "__len__") else None
    good = stream.take(min(_ROWS_CHECKED, rows or _ROWS_CHECKED))
    dropped = stream.dropped
    bad = len({row_id for row_id, _ in dropped})  # a small data set is read more than once
    checked = min(len(good) + len(dropped), rows or sys.maxsize)
    size = f"{rows} rows" if rows is not None else "streamed rows"
    text = f"{size}; {bad} of {checked} checked are bad"
    return text + (f", such as {dropped[0][0]}: {dropped[0][1]}" if dropped else ""), good


def _folder(config: Config) -> Path | None:
    """Return the folder of the model's files; None if they are only on the hub, or not created yet."""
    path = config.model.path
    folder = Path(model_folder(path)) if path else base_model_folder(config)
    if path and not folder.is_dir():
        from othink_ray.families import cached_folder

        folder = cached_folder(path) or folder
    return folder if (folder / "config.json").is_file() else None


def _no_model_files(path: str | None) -> str:
    if path is None:
        return "created at the first start: not checked, and no memory plan"
    return f"on the hub, not on this machine: not checked, and no memory plan; for both, run hf download {path}"


def _weights_of(folder: Path) -> int | None:
    """Return the number of weights, from the headers of the *.safetensors files; None if there is no file."""
    from safetensors import safe_open

    files = list(folder.glob("*.safetensors"))
    if not files:
        return None
    count = 0
    for file in files:
        with safe_open(file, framework="np") as opened:
            count += sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return count


def _model(
    config: Config, folder: Path, weights: int, samples: Sequence[Prompt]
) -> tuple[dict[str, str], list[Problem]]:
    from othink_ray.driver.memory_check import measure, memory_problems, plan_memory, table
    from othink_ray.engines.lora import AdapterError, require_servable
    from othink_ray.engines.policy import count_trained
    from othink_ray.families import open_family
    from othink_ray.families.base import ModelError

    try:
        family = open_family(config.model, str(folder))
    except ModelError as error:
        return {}, [Problem(subject=f"model = {config.model.name}", rule=str(error), remedy="")]
    text, problems = _lengths(config, family, samples)
    lines = {"context": text}
    try:
        require_servable(family, config.learner, config.rollout.engine)
        trained = count_trained(family, config.learner)
        problems += _disk_problems(config, weights, trained)
        measured = measure(config, family)
        lines |= _sizes(config, weights, trained) | {"memory": table(plan_memory(config, measured))}
        problems += memory_problems(config, family, measured)
    except AdapterError as error:
        problems.append(error.problem)
    return lines, problems


def _sizes(config: Config, weights: int, trained: int) -> dict[str, str]:
    size = _size(weights * _BYTES[config.model.dtype])
    return {
        "model files": f"{_amount(weights)} weights, {size} as {config.model.dtype}",
        "trained": f"{_amount(trained)} weights",
    }


def _disk_problems(config: Config, weights: int, trained: int) -> Iterator[Problem]:
    kept = config.train.keep_last + config.train.keep_best + 1  # including the one being written
    needed = 12 * trained * kept + weights * _BYTES[config.model.dtype]
    folder = Path(config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        rule = (
            f"needs about {_size(needed)} for {kept} checkpoints (one of them being written) and the export; "
            f"{folder} has {_size(free)} free"
        )
        yield Problem(
            subject=f"run.dir = {config.run.dir}", rule=rule, remedy="Free disk space, or lower train.keep_last."
        )


def _lengths(config: Config, family: Family, samples: Sequence[Prompt]) -> tuple[str, list[Problem]]:
    longest, too_long = 0, []
    for prompt in samples:
        try:
            longest = max(longest, sum(family.prompt_lengths(prompt)))
            family.check_fits(config.rollout, prompt)
        except BadRow as bad:
            too_long.append(bad)
    text = (
        f"the longest of {len(samples)} questions has {longest} tokens with its images, an answer up to "
        f"{config.rollout.max_tokens}; rollout.max_model_len = {config.rollout.max_model_len}; "
        f"{len(too_long)} do not fit"
    )
    if not samples or len(too_long) < len(samples):
        return text, []
    first = too_long[0]
    rule = f"none of the {len(samples)} questions checked fits; the first, {first.row_id}: {first.reason}"
    for key, remedy in _LIMITS.items():
        if f"{key} = " in first.reason:
            return text, [broken(config, key, rule, remedy)]
    remedy = f"{first.remedy[0].upper()}{first.remedy[1:]}."
    return text, [Problem(subject=f"data = {config.data.name}", rule=rule, remedy=remedy)]


def _amount(count: float) -> str:
    for limit, unit in ((1e9, "billion"), (1e6, "million")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count:.0f}"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

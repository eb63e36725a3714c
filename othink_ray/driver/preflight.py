"""What of the GPUs would stand still, read from the configuration alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from othink_ray.config.errors import Problem
from othink_ray.config.model_rules import base_model_folder, model_folder
from othink_ray.config.rules import paired
from othink_ray.config.schema import Config
from othink_ray.data import BadRow, PromptStream, SourceError, Split, open_source, open_training
from othink_ray.runtime.placement import all_bundles, describe
from othink_ray.types import Prompt

if TYPE_CHECKING:
    from othink_ray.families.base import Family


_FULL = 0.25  # of rollout.max_num_seqs: with fewer sequences side by side a GPU reads all weights for few tokens


def idle_gpus(config: Config) -> list[str]:
    """A line for each waste, with the key to turn; nothing where no GPU takes part."""
    rollout, learner, train = config.rollout, config.learner, config.train
    if rollout.gpus_per_actor <= 0 or learner.gpus_per_rank <= 0:
        return []
    said = []
    engines, ranks = rollout.num_actors * rollout.gpus_per_actor, learner.world_size * learner.gpus_per_rank
    if not paired(learner, rollout) and not train.overlap:
        said.append(
            f"{engines:g} GPUs of engines wait while the learner works, and its {ranks:g} while they do: "
            "train.overlap=true lets both work at once"
        )
    side_by_side = train.prompts_per_step * config.algo.group_size / rollout.num_actors
    if side_by_side < _FULL * rollout.max_num_seqs:
        said.append(
            f"an engine samples {side_by_side:g} answers a step, and has room for {rollout.max_num_seqs} side by "
            "side (rollout.max_num_seqs): raise train.prompts_per_step, or lower rollout.num_actors"
        )
    if train.prompts_per_step < rollout.num_actors:
        said.append(
            f"{rollout.num_actors - train.prompts_per_step} engines get no prompt: train.prompts_per_step is "
            f"{train.prompts_per_step}, rollout.num_actors {rollout.num_actors}"
        )
    if learner.zero_stage == 3 and learner.world_size > _RANKS_OF_NODE:
        said.append(
            f"ZeRO-3 gathers the weights from {learner.world_size} ranks on several nodes in every pass: "
            "learner.zero_stage=2 keeps them on each, where they fit"
        )
    return said


_RANKS_OF_NODE = 8


_LOOKED_AT = 32  # rows of each split
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightReport:
    """What was found, a line each, and what is in the way."""

    lines: dict[str, str]
    problems: Sequence[Problem]


def preflight(config: Config) -> PreflightReport:
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
        lines["seats"] = describe(bundles, [_HERE] * len(bundles), driver=_HERE)
    if said := idle_gpus(config):
        lines["idle_gpus"] = "\n    ".join(said)
    folder = _folder(config)
    if folder is not None:
        weights = _weights_of(folder)
        if weights is None:
            rule = f"{folder} holds no *.safetensors file; weights in other files could run code when they are read"
            problems.append(Problem(subject="model.path", rule=rule, remedy="Save the model with safetensors."))
        else:
            found_lines, found_problems = _model(config, folder, weights, samples)
            lines |= found_lines
            problems += found_problems
    else:
        lines["model files"] = _not_there(config.model.path)
    return PreflightReport(lines=lines, problems=problems)


_HERE = "this machine"


def _sample(config: Config, split: Split) -> tuple[str, list[Prompt]]:
    source = open_training(config.data) if split == "train" else open_source(config.data, split)
    stream = PromptStream(source, seed=config.train.seed, on_bad_row="drop")
    rows = len(source) if hasattr(source, "__len__") else None
    good = stream.take(min(_LOOKED_AT, rows or _LOOKED_AT))
    dropped = stream.dropped
    told = f"{rows if rows is not None else 'passing'} rows; of {len(good) + len(dropped)} looked at {len(dropped)} bad"
    return told + (f", such as {dropped[0][0]}: {dropped[0][1]}" if dropped else ""), good


def _folder(config: Config) -> Path | None:
    """Where the model's files lie; None where they are on the hub alone or still to be made."""
    path = config.model.path
    folder = Path(model_folder(path)) if path else base_model_folder(config)
    if path and not folder.is_dir():
        from othink_ray.families import cached_folder

        folder = cached_folder(path) or folder
    return folder if (folder / "config.json").is_file() else None


def _not_there(path: str | None) -> str:
    if path is None:
        return "made at the first start: not looked at, so no memory is planned either"
    return f"on the hub and not here: not looked at, no memory is planned. To have that: hf download {path}"


def _weights_of(folder: Path) -> int | None:
    """How many there are, from the headers of the files."""
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
    from othink_ray.engines.lora import AdapterError, count_trained, require_servable
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
        problems += _room_on_disk(config, weights, trained)
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


def _room_on_disk(config: Config, weights: int, trained: int) -> Iterator[Problem]:
    kept = config.train.keep_last + config.train.keep_best + 1  # and the one that is being written
    needed = 12 * trained * kept + weights * _BYTES[config.model.dtype]
    place = Path(config.run.dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        rule = (
            f"needs about {_size(needed)} for {kept} checkpoints (one of them being written) and the export; "
            f"{place} has {_size(free)} free"
        )
        yield Problem(subject=f"run.dir = {config.run.dir}", rule=rule, remedy="Make room, or lower train.keep_last.")


def _lengths(config: Config, family: Family, samples: Sequence[Prompt]) -> tuple[str, list[Problem]]:
    from othink_ray.families.base import check_fits, lengths

    longest, too_long = 0, []
    for prompt in samples:
        try:
            longest = max(longest, sum(lengths(family, prompt)))
            check_fits(family, config.rollout, prompt)
        except BadRow as bad:
            too_long.append(bad)
    told = (
        f"the longest of {len(samples)} questions has {longest} tokens with its images, an answer "
        f"{config.rollout.max_tokens}, and there is room for {config.rollout.max_model_len}; {len(too_long)} too long"
    )
    if not samples or len(too_long) < len(samples):
        return told, []
    rule = f"no question fits: {too_long[0].reason}"
    return told, [Problem(subject="rollout.max_model_len", rule=rule, remedy=too_long[0].remedy)]


def _amount(count: float) -> str:
    for limit, unit in ((1e9, "billion"), (1e6, "million")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count:.0f}"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

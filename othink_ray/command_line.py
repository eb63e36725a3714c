"""Command line: read and validate a configuration, then run its mode."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from othink_ray.config.errors import ConfigError, Problem
from othink_ray.config.load import conf_dir, groups, origins, read, register_defaults, sweep_jobs
from othink_ray.config.paths import in_ray_job, output_path
from othink_ray.config.reference import common_keys, described
from othink_ray.config.schema import Config
from othink_ray.config.strict import convert, problems_of_value
from othink_ray.config.validate import machine_for, plan, problems
from othink_ray.driver.exit_reporter import ExitReporter
from othink_ray.driver.stopping import interrupted_status, interruptible, stop_requested

if TYPE_CHECKING:
    from omegaconf import DictConfig

_RESUME_HINT = "run the same command again to resume"
HELP = """\
othink_ray trains a vision-language model with GRPO-D on Ray, vLLM and DeepSpeed.

  python -m othink_ray.main [group=name] [a.b=value] ...
  othink-ray MODE [group=name] [a.b=value] ...            the same with mode=MODE

Modes
  mode=train   GRPO-D from a model and a data set to an exported model (the default)
  mode=sft     supervised fine-tuning on worked answers, with the same data, learner and run folder
  mode=eval    evaluate Hugging Face folders or runs: accuracy, mean@k, pass@k, a matrix of models and tasks
  mode=study   the paper's experiments: all runs, then tables and figures beside the paper's (study=paper)
  mode=check   validate a configuration and print its resource plan; starts nothing

Groups
{groups}

Common keys with their defaults (a group option may set another value)
{keys}

  All keys: docs/config.md. The keys of one section: --help algo.kl. The values of a run: --cfg job

Examples
  python -m othink_ray.main                                               train the tiny model to count, on a CPU
  python -m othink_ray.main algo=grpo algo.kl.beta_min=0.04 train.steps=50    GRPO with a constant KL weight, 50 steps
  python -m othink_ray.main -m algo=grpo_d,grpo train.seed=0,1            four runs, one after the other
  python -m othink_ray.main mode=sft train.prompts_per_step=64 learner.lr=5e-4    the supervised baseline
  python -m othink_ray.main mode=eval 'eval.models=[runs/a,runs/b]' 'eval.also=[geometry]' eval.samples=8
  python -m othink_ray.main model=qwen2_vl_2b cluster=one_node mode=check     does it fit 8 GPUs?

Hydra flags: --cfg job, --info, -m (sweep), --hydra-help.
"""


def run_command(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status; 2 for an invalid configuration."""
    if "--help" in arguments or "-h" in arguments:
        return _help([argument for argument in arguments if not argument.startswith("-") and "=" not in argument])
    if any(argument.startswith("-") for argument in arguments):
        return _through_hydra(arguments)
    return _launch(*read(arguments), arguments)


def _help(names: Sequence[str]) -> int:
    """Print the general help, or the reference of these keys and sections; return the exit status."""
    if not names:
        rows = (f"  {group:<8} {', '.join(options)}" for group, options in groups(conf_dir()).items())
        print(HELP.format(groups="\n".join(rows), keys=common_keys()), end="")
        return 0
    found = [
        problem
        for name in names
        if described(name) is None
        for problem in problems_of_value(name, {}, lambda _: "--help")
    ]
    if found:
        return _reject(found)
    print("\n".join(filter(None, map(described, names))))
    return 0


def _launch(config: Config | None, found: list[Problem], overrides: Sequence[str]) -> int:
    if config is None:
        return _reject(found)
    machine = machine_for(config)
    found = found + problems(config, machine)
    if config.mode == "study" and not found:
        config, found = _prepare_study(config, overrides)
    if found:
        return _reject(found)
    if in_ray_job():
        print(f"Ray job: output is kept outside the job's folder, run.dir = {socket.gethostname()}:{config.run.dir}")
    if config.mode == "check":
        return _check(config, plan(config, machine))
    if config.mode == "study":
        return _study(config, overrides)
    # Libraries read these at import. Their progress bars would garble the console, which shows progress itself.
    os.environ.setdefault("TQDM_DISABLE", "1")
    if config.learner.gpus_per_rank == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no accelerator
    from othink_ray.driver.run import run
    from othink_ray.report import write_evaluation_report, write_report

    return run(config, write_evaluation_report if config.mode == "eval" else write_report)


def _check(config: Config, planned: str) -> int:
    """Print the resource plan, or the problems of data, model and disk; return the exit status. Starts no actor."""
    from othink_ray.driver.preflight import preflight

    found = preflight(config)
    if found.problems:
        return _reject(list(found.problems))
    from othink_ray.driver.console import printable

    print(f"configuration is sound\n{planned}")
    for name, text in found.lines.items():
        print(f"  {name:<11} {printable(text)}")  # row names come from data files: untrusted text
    return 0


def _prepare_study(config: Config, overrides: Sequence[str]) -> tuple[Config, list[Problem]]:
    """Return the configuration and the problems of the study's runs, checked with one seed each.

    Unless an override sets run.dir, the run folder is named after the study and its size.
    """
    from othink_ray.study.plan import base_overrides, for_runs, key_of, planned

    if "run.dir" not in map(key_of, overrides):
        folder = output_path(f"runs/study_{config.study.name}_{config.study.size}")
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=folder))
    extra = for_runs(overrides)
    runs = [run.overrides for run in planned(config.study, extra) if run.seed == 0]
    if config.model.path is None:
        runs.append(base_overrides(config.study, extra))
    return config, _problems_of_runs(runs, starts_runs=True)


def _study(config: Config, overrides: Sequence[str]) -> int:
    """Run a study, one process per run, and return its exit status."""
    from othink_ray.driver.live_console import open_console
    from othink_ray.study.launch import StudyError
    from othink_ray.study.page import write_study_report
    from othink_ray.study.run import Study

    with open_console() as console:
        try:
            with (
                interruptible(),
                ExitReporter(Path(config.run.dir), "study.json", write_study_report, _RESUME_HINT),
                console.phase(f"study {config.study.name}, {config.study.size}, in {config.run.dir}"),
            ):
                return Study(config, overrides).run(console, write_study_report)
        except StudyError as error:
            console.say(f"stopped: {error}")
            return 1
        except KeyboardInterrupt:
            console.say(f"interrupted: {_RESUME_HINT}")
            return interrupted_status()


def _reject(found: Sequence[Problem]) -> int:
    """Print the problems to stderr and return exit status 2."""
    from othink_ray.driver.console import printable

    print(printable(str(ConfigError(found))), file=sys.stderr)
    return 2


def _through_hydra(arguments: Sequence[str]) -> int:
    """Handle Hydra's flags: Hydra prints or sweeps, after the same checks as without flags."""
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    flags, unknown = get_args_parser().parse_known_intermixed_args(arguments)
    overrides = [*flags.overrides, *unknown]
    hydra_flags = [argument for argument in arguments if argument not in overrides]
    shipped_conf = not (flags.config_path or flags.config_name or flags.experimental_rerun)
    more = Path(flags.config_dir).absolute() if flags.config_dir and Path(flags.config_dir).is_dir() else None
    if unknown or (shipped_conf and (flags.multirun or flags.run or flags.cfg or more)):
        found = _problems_of_runs(sweep_jobs(overrides), more, starts_runs=flags.cfg is None)
        if found:
            return _reject(found)
    register_defaults()

    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def job(node: DictConfig) -> None:
        settings = HydraConfig.get()
        config, found = convert(node, origins(settings.runtime, settings.overrides.task))
        if config is not None and settings.mode is RunMode.MULTIRUN:
            folder = Path(config.run.dir) / str(settings.job.num)
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))
        status = _launch(config, found, settings.overrides.task)
        if stop_requested():  # stop the whole sweep, not only this job
            sys.exit(status or 143)
        codes.append(status)

    sys.argv[1:] = [*overrides, *hydra_flags]  # Hydra's parser needs the overrides to be contiguous
    job()
    return max(codes, default=0)


def _problems_of_runs(runs: Iterable[Sequence[str]], more: Path | None = None, *, starts_runs: bool) -> list[Problem]:
    """Return the problems of all runs, given by their overrides, before the first one starts.

    `more`: --config-dir; `starts_runs`: check the rules and the machine too, not only types and names.
    """
    found: list[Problem] = []
    for overrides in runs:
        config, problems_of_run = read(overrides, more=more)
        found += problems_of_run
        if config is not None and starts_runs:
            found += problems(config, machine_for(config))
    return found

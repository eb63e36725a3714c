"""The real command line: a broken configuration gives exit code 2 and one report, quickly and without traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import pytest

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    seconds: float


def run(arguments: Sequence[str], folder: Path) -> Outcome:
    """Run the entry point; `seconds` is CPU time, which does not depend on other load on the machine."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "othink_ray.main", *arguments],
            stdout=out,
            stderr=err,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""},
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        shown, errors = (" ".join(stream.read().split()) for stream in (out, err))
    return Outcome(process.returncode, shown, errors, usage.ru_utime + usage.ru_stime)


# name -> overrides, number of problems, words of the report
BROKEN: dict[str, tuple[list[str], int, list[str]]] = {
    "misspelled key": (
        ["algo.gruop_size=4"],
        1,
        [
            "algo.gruop_size = 4 (command line) unknown key",
            "Did you mean algo.group_size?",
            "Keys of algo: name, group_size, clip_eps",
        ],
    ),
    "key without its section": (["lr=1e-5"], 1, ["lr = 1e-05 (command line)", "Did you mean learner.lr?"]),
    "unknown option": (
        ["model=qwen2_vl_3b"],
        1,
        ["no qwen2_vl_3b in the group model", "Options: bench, internvl3_1b,"],
    ),
    "text for a number": (["train.steps=many"], 1, ["train.steps = many (command line) must be an integer"]),
    "true for a number": (["learner.lr=true"], 1, ["learner.lr = true (command line) must be a finite number"]),
    "null for a number": (["train.seed=null"], 1, ["train.seed = null (command line) must be an integer"]),
    "no equals sign": (["train.steps"], 1, ["train.steps (command line) is not of the form group=name or a.b=value"]),
    "unquoted tilde": (["run.dir=~/runs"], 1, ["run.dir=~/runs (command line)", "'run.dir=\"~/runs\"'"]),
    "value for a section": (
        ["algo.kl=linear"],
        1,
        ["algo.kl = linear (command line) is a section", "algo.kl.schedule"],
    ),
    "sweep without -m": (["train.seed=0,1"], 1, ["train.seed=0,1 (command line) gives several values", "Add -m"]),
    "key of another model": (
        ["model=qwen2_vl_2b", "model.tiny.text_width=64"],
        1,
        ["model.tiny.text_width=64 (command line)", "Remove it, or choose a group option that has this key"],
    ),
    "group of one": (
        ["algo.group_size=1"],
        1,
        ["algo.group_size = 1 must be at least 2", "the other answers of its group (Eq. 2)"],
    ),
    "swapped betas": (
        ["algo.kl.beta_min=0.2"],
        1,
        ["algo.kl.beta_max = 0.1", "beta_min = 0.2", "lower algo.kl.beta_min"],
    ),
    "unknown schedule": (["algo.kl.schedule=cosin"], 1, ["must be one of paper, linear, cosine", "schedule=cosine?"]),
    "indivisible batch": (
        ["learner.world_size=3", "learner.cpus_per_rank=0"],
        1,
        ["train.prompts_per_step = 16", "learner.world_size = 3", "Set train.prompts_per_step=18"],
    ),
    "missing GPUs": (
        ["rollout=vllm_gpu", "rollout.cpus_per_actor=0"],
        1,
        ["need 4 GPUs in total, but there are 0", "rollout=vllm learner=deepspeed need no GPU"],
    ),
    "three mistakes at once": (
        ["algo.gruop_size=4", "train.steps=many", "algo.kl.beta_min=-0.1"],
        3,
        ["Did you mean algo.group_size?", "train.steps = many", "algo.kl.beta_min = -0.1 must be at least 0"],
    ),
    "dashes": (
        ["--learner.lr=1e-5"],
        1,
        ["--learner.lr=1e-5 (command line) unknown flag", "without dashes: learner.lr=1e-5"],
    ),
    "misspelling in a sweep": (["-m", "algo=grpo,grpo_d", "train.stepz=3"], 1, ["Did you mean train.steps?"]),
    "last value of a sweep": (
        ["train.seed=0", "-m", "learner.lr=1e-5,0"],
        1,
        ["learner.lr = 0 must be greater than 0"],
    ),
    "misspelling beside --cfg": (["--cfg", "job", "train.stepz=3"], 1, ["Did you mean train.steps?"]),
}

# A user's folder of conf files, given by --config-dir.
CONF = {
    "algo/late.yaml": "defaults: [grpo, _self_]\nname: late\ncorrection: token\n",
    "algo/short.yaml": "defaults: [grpo, _self_]\nname: short\ngroup_size: 4\n",
}
BROKEN |= {
    "old key": (["algo.correction=token"], 1, ["algo.correction = token (command line) was renamed to algo.tis"]),
    "old option": (["data=own"], 1, ["data=own (command line) was renamed to data=custom"]),
    "old key in a folder of the user": (
        ["--config-dir", "mine", "algo=late"],
        1,
        ["algo.correction = token (mine/algo/late.yaml)", "Write algo.tis=token."],
    ),
    "old key beside a folder of the user": (
        ["--config-dir", "mine", "algo=short", "train.read_ahead=false"],
        1,
        ["train.read_ahead = false (command line)", "Write train.prefetch_prompts=false."],
    ),
}

VALID: dict[str, list[str]] = {
    "help": ["--help"],
    "check": ["mode=check", "train.steps=3"],
    "cfg": ["--cfg", "job", "algo=grpo"],
    "sweep": ["mode=check", "-m", "algo.kl.beta_min=0.01,0.02", "run.dir=swept"],
    "hydra help": ["--hydra-help"],
    "folder of the user": ["--config-dir", "mine", "algo=short", "mode=check"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cwd")
    for name, text in CONF.items():
        (folder / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "mine" / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    jobs = {**{name: case[0] for name, case in BROKEN.items()}, **VALID}
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(jobs, pool.map(lambda arguments: run(arguments, folder), jobs.values()), strict=True))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_configuration_gives_one_report(outcomes: dict[str, Outcome], name: str) -> None:
    _, count, words = BROKEN[name]
    outcome = outcomes[name]
    assert outcome.code == 2, outcome
    assert outcome.err.startswith(f"{count} problem{'s' if count > 1 else ''} in the configuration:"), outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    assert outcome.out == ""
    assert outcome.seconds < 5
    for word in words:
        assert word in outcome.err


def test_help_lists_modes_groups_and_examples_within_a_second(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["help"]
    assert outcome.code == 0
    for word in (
        "mode=train",
        "mode=sft",
        "mode=eval",
        "mode=check",
        "grpo, grpo_d, gspo",
        "one_node",
        "algo.kl.beta_min",
        "--cfg job",
    ):
        assert word in outcome.out
    assert outcome.out.count("python -m othink_ray.main") == 7  # the usage line and six examples
    assert outcome.seconds < 1


def test_check_mode_prints_the_resource_plan(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["check"]
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("configuration is sound")
    for word in ("1 x vllm: 0.5 CPUs", "1 x DeepSpeed ZeRO-1", "16 prompts x 8 answers = 128", "3 steps"):
        assert word in outcome.out


def test_options_of_a_folder_of_the_user_are_selected(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["folder of the user"]
    assert outcome.code == 0, outcome.err
    assert "16 prompts x 4 answers = 64" in outcome.out


def test_cfg_flag_prints_the_whole_job(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["cfg"]
    assert outcome.code == 0, outcome.err
    assert "schedule: constant" in outcome.out
    assert "prompts_per_step: 16" in outcome.out
    assert "hydra" not in outcome.out


def test_sweep_runs_each_job_in_its_own_folder(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["sweep"]
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("configuration is sound") == 2
    assert "swept/0" in outcome.out
    assert "swept/1" in outcome.out


def test_hydra_help_is_printed_by_hydra(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["hydra help"].code == 0
    assert "hydra.cc" in outcomes["hydra help"].out


def test_checks_write_no_file_but_the_record_of_the_sweep(outcomes: dict[str, Outcome], folder: Path) -> None:
    assert outcomes
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == {"swept/multirun.yaml", *(f"mine/{name}" for name in CONF)}

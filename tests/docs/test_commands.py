"""Commands and Python blocks of README.md and docs/ work: each is run, or its settings are checked."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from othink_ray.config.load import load, sweep_jobs
from othink_ray.config.validate import Machine, problems
from othink_ray.main import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAIN = (".venv/bin/python", "-m", "othink_ray.main")

# Commands that are really run, shortened, in this order; of all others only the settings are checked.
EXECUTED = {
    "commands.md": ("mode=sft", "model.path=runs/sft", "mode=eval"),
    "first_run.md": ("run.dir=runs/first", "run.resume=auto"),
    "custom_data.md": ("run.dir=runs/own",),
    "custom_reward.md": ("algo.reward.custom=my_rewards.py:brevity",),
}
SHORTENED = (
    *("rollout=hf", "train.steps=1", "train.prompts_per_step=2", "algo.group_size=2", "rollout.max_tokens=8"),
    *("model.tiny.warm_steps=1", "model.tiny.warm_batch=2", "eval.questions=2", "eval.every=0"),
)
# Commands with these prefixes are not run, with the reason; their settings must be valid all the same.
NOT_RUN = {
    "launch/setup_env.sh": "installs an environment; tests/launch/test_setup_env.py",
    "launch/gpu_check.sh": "needs a GPU; tests/bench/test_gpu_check.py",
    ".venv/bin/python -m benchmarks.memory": "takes most of 24 GiB; tests/bench/test_memory.py",
    "launch/local.sh": "sets up first; tests/launch/test_launchers.py",
    "make": "sets up first, and most targets take minutes or hours: a dry run",
    ".venv/bin/python -m tests.drills.unguarded": "takes a quarter of an hour; tests/drills/test_unguarded.py",
    "ray start": "has fixed ports; tests/drills/test_two_hosts.py",
    "ray job": "needs a cluster at that address; tests/drills/test_two_hosts.py",
    "ray up": "needs machines; tests/launch/test_ray_up.py",
    "sbatch": "needs Slurm; tests/drills/test_slurm.py",
    "docker build": "needs Docker",
    "envsubst": "needs Kubernetes; tests/launch/test_launchers.py",
}
# Accepted problems: data files and model folders that only the reader has.
MISSING_FILES = ("does not exist (relative paths start from", "is none of these")
# The largest option of the group cluster with a local Ray has 8 GPUs.
LARGE = Machine(cpus=256, gpus=8)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[str]:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if shlex.split(line, comments=True):
                yield line


def reason_not_to_run(command: str) -> str | None:
    return next((start for start in NOT_RUN if command == start or command.startswith(f"{start} ")), None)


def settings(text: str) -> list[str]:
    """Return the settings in a command, including those inside quoted words and ARGS."""
    words = [word for outer in shlex.split(text, comments=True) for word in [outer, *outer.split()]]
    found = [word for word in words if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=\S*$", word)]
    nested = [word.partition("=")[2].split() for word in words if re.match(r"ARGS=", word)]
    return list(dict.fromkeys([*found, *(word for inner in nested for word in inner if "=" in word)]))


def check(overrides: Sequence[str]) -> None:
    for job in sweep_jobs(overrides):
        found = problems(load(job), LARGE)
        assert not [problem for problem in found if not any(rule in problem.rule for rule in MISSING_FILES)], found


def call(arguments: Sequence[str]) -> None:
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        status = main(arguments)
    assert status == 0, output.getvalue()


def shell(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={"PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(command: str, page: Path, folder: Path) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        for line in shell(
            f"make --dry-run --directory={shlex.quote(str(ROOT))} {shlex.join(words[1:])}", folder
        ).splitlines():
            check(settings(line) if "othink_ray.main" in line else [])
    elif reason_not_to_run(command):
        check(settings(command))
    elif tuple(words[:3]) == MAIN:
        arguments = words[3:]
        if {"--help", "--cfg"} & set(arguments):
            call(arguments)
        elif any(mark in arguments for mark in EXECUTED.get(page.name, ())):
            # The Ray of the tests has another working directory.
            placed = [re.sub(r"\b(runs|my)/", rf"{folder}/\1/", argument) for argument in arguments]
            call([*placed, *SHORTENED, f"run.cache_dir={folder}/cache"])
        else:
            check([word for word in arguments if word != "-m"])
    else:
        shell(command, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory in which all pages are followed, as a reader would."""
    return tmp_path_factory.mktemp("reader")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_code_of_a_page_work(
    page: Path, folder: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    code = "\n".join(blocks(page, "python"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for command in commands(page):
        try:
            run(command, page, folder)
        except (AssertionError, ValueError) as error:
            pytest.fail(f"{page.name}: {command}\n{error}")


def test_all_listed_commands_are_on_the_pages() -> None:
    shown = {page.name: list(commands(page)) for page in PAGES}
    used = {reason_not_to_run(command) for page in shown.values() for command in page}
    assert used - {None} == set(NOT_RUN)
    for name, marks in EXECUTED.items():
        for mark in marks:
            assert any(mark in settings(command) for command in shown[name]), f"{name}: {mark}"

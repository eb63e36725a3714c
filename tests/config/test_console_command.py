"""The console command `othink-ray`: its translation, its completion, and the process that it becomes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from othink_ray.config.bounds import MODES
from othink_ray.config.errors import ConfigError
from othink_ray.config.keys import keys
from othink_ray.config.load import conf_dir, groups
from othink_ray.config.schema import Config
from othink_ray.console_command import candidates, translated

REPO = Path(__file__).resolve().parents[2]
CPU_SECONDS = 0.5  # of one completion, with the start of Python


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """An executable `othink-ray` that runs this checkout."""
    file = tmp_path / "bin" / "othink-ray"
    file.parent.mkdir()
    file.write_text(
        f"#!{sys.executable}\nimport sys\nfrom othink_ray.console_command import start\nsys.exit(start())\n"
    )
    file.chmod(0o755)
    return file


def environment(command: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), "PATH": f"{command.parent}:/usr/bin:/bin"}


def run(command: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [command, *words], cwd=command.parent, env=environment(command), capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_becomes_the_key_mode(mode: str) -> None:
    assert translated([mode, "train.steps=3", "-m"]) == [f"mode={mode}", "train.steps=3", "-m"]


def test_words_that_name_no_mode_are_passed_on() -> None:
    assert translated([]) == ["--help"]
    for words in (["--cfg", "job"], ["train.steps=3"], ["-m", "train.seed=0,1"], ["mode=check"]):
        assert translated(words) == words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tarin"], "tarin (command line) unknown mode Did you mean train?"),
        (["train", "mode=eval"], "mode=eval (command line) is a second mode Remove mode=eval or train."),
    ],
)
def test_a_wrong_mode_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        translated(words)
    assert message in " ".join(str(error.value).split())


def test_help_version_and_errors_of_the_command(command: Path) -> None:
    assert run(command).stdout == run(command, "--help").stdout
    assert "othink-ray MODE" in run(command).stdout
    assert re.fullmatch(r"othink_ray \d+\.\d+\.\d+\n", run(command, "--version").stdout)
    for words, message in (
        (["evla"], "Did you mean eval?"),
        (["completion", "fsh"], "unknown shell fsh; use bash, zsh or fish"),
    ):
        refused = run(command, *words)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert message in refused.stderr


def test_the_command_prints_the_same_job_as_python(command: Path) -> None:
    module = [sys.executable, "-m", "othink_ray.main", "mode=sft", "--cfg", "job", "algo=grpo"]
    expected = subprocess.run(module, env=environment(command), capture_output=True, text=True, timeout=60)
    shown = run(command, "sft", "--cfg", "job", "algo=grpo")
    assert "mode: sft" in shown.stdout
    assert (shown.returncode, shown.stdout) == (expected.returncode, expected.stdout)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_process_of_the_command(command: Path, number: int, status: int) -> None:
    process = subprocess.Popen(
        [command, "train", f"run.dir={command.parent}/run"], env=environment(command), stdout=subprocess.PIPE, text=True
    )
    proc, deadline = Path(f"/proc/{process.pid}"), time.monotonic() + 30

    def ready() -> bool:
        """Return whether the process is `python -m othink_ray.main` and its handler of SIGTERM is installed."""
        caught = re.search(r"^SigCgt:\s*(\w+)$", (proc / "status").read_text(), re.MULTILINE)
        catches = caught is not None and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1
        return bool(catches) and b"othink_ray.main" in (proc / "cmdline").read_bytes()

    while not ready() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (status, "interrupted\n")


# ---- completion


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tr"], {"train"}),
        (["co"], {"completion"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
        (["train", "algo"], {"algo=", "algo."}),
        (["train", "algo.k"], {"algo.kl."}),
        (["train", "algo.kl.beta"], {"algo.kl.beta_min=", "algo.kl.beta_max="}),
        (["train", "cluster=two"], {"cluster=two_nodes"}),
        (["train", "algo.kl.estimator="], {f"algo.kl.estimator=k{k}" for k in (1, 2, 3)}),
        (["train", "train.overlap="], {"train.overlap=true", "train.overlap=false"}),
        (["train", "--c"], {"--cfg"}),
        (["train", "train.steps="], set()),
        (["train", "nothing.s"], set()),
        (["train", "mod"], {"model=", "model."}),
    ],
)
def test_the_last_word_is_completed(words: list[str], found: set[str]) -> None:
    assert set(candidates(words)) == found


def test_every_group_key_and_choice_is_offered() -> None:
    found = [key for key in keys(Config) if key.name != "mode"]
    assert len(found) > 100
    for key in found:
        assert f"{key.name}=" in candidates(["train", key.name])
        if key.bound is not None and key.bound.choices:
            assert candidates(["train", f"{key.name}="]) == [f"{key.name}={choice}" for choice in key.bound.choices]
    for group, options in groups(conf_dir()).items():
        assert candidates(["train", f"{group}="]) == [f"{group}={option}" for option in options]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("othink-ray che", ["check"]),
        ("othink-ray train algo.kl.sch", ["algo.kl.schedule="]),
        ("othink-ray train algo.kl.schedule=pa", ["paper"]),
        ("othink-ray train model=tiny data=count", ["counting"]),
    ],
)
def test_bash_completes_the_word_at_the_cursor(command: Path, line: str, found: list[str]) -> None:
    script = """
        source <(othink-ray completion bash)
        COMP_LINE=$1 COMP_POINT=${#1}
        _othink_ray othink-ray 2>/dev/null
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", script, "bash", line], env=environment(command), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == found, done.stderr


def test_completion_takes_less_than_half_a_second_of_cpu(command: Path) -> None:
    process = subprocess.Popen([command, "completion", "words", "train", "algo."], env=environment(command))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_utime + usage.ru_stime < CPU_SECONDS

"""Console output on a pipe, in CI and on a terminal."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console as Terminal

from othink_ray.driver.console import EvalAccuracy, matrix, plain_line
from othink_ray.driver.live_console import Sample, latest_values, open_console, sample_panel, sparkline
from othink_ray.types import Completion, Group, Message, Prompt, ScoredGroup

BEFORE = {"accuracy": 0.46, "lo": 0.392, "hi": 0.529, "format": 0.88, "n": 200, "tokens_mean": 24.1}
AFTER = {"accuracy": 0.66, "lo": 0.592, "hi": 0.722, "format": 1.0, "n": 200, "tokens_mean": 23.0}


class TerminalStream(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("CI", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def metrics(step: int) -> dict[str, float]:
    return {
        "reward/mean": 1.0 + step / 1000,
        "reward/accuracy": 0.5,
        "reward/format": 0.9,
        "kl/beta": 0.04,
        "kl/mean": 3.1e-3,
        "audit/logp_gap_max": 2e-6,
        "time/step_s": 1.5,
        "time/generate_s": 0.75,
        "time/score_s": 0.0,
        "time/update_s": 0.5,
        "time/push_s": 0.25,
        "throughput/samples_per_s": 40.0,
        "tokens/completion_mean": 25.0,
    }


def scored_group(text: str) -> ScoredGroup:
    answer = Completion(
        token_ids=np.arange(3, dtype=np.int64),
        sampler_logprobs=np.zeros(3, dtype=np.float32),
        text=text,
        finish="stop",
    )
    prompt = Prompt(
        id="q1", messages=(Message(role="user", text="How many [red] things?"),), images=(), answer="3", task="counting"
    )
    group = Group(prompt=prompt, prompt_token_ids=np.arange(2, dtype=np.int64), completions=(answer,), version=0)
    return ScoredGroup(group=group, rewards=np.array([1.25]), parts={}, valid=np.array([True]))


def training_output(steps: int, *, stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    with open_console(stream) as console, console.training(steps):
        for step in range(1, steps + 1):
            console.step(step, metrics(step))
    return stream.getvalue()


def rendered(renderable: object) -> str:
    terminal = Terminal(file=io.StringIO(), width=90, color_system=None)
    terminal.print(renderable)
    assert isinstance(terminal.file, io.StringIO)
    return terminal.file.getvalue()


def printed_steps(output: str) -> list[int]:
    return [int(line.split()[1].partition("/")[0]) for line in output.splitlines()]


def test_a_short_run_prints_every_step_on_a_pipe() -> None:
    assert printed_steps(training_output(20)) == list(range(1, 21))


def test_a_long_run_prints_first_tenth_and_last_steps_on_a_pipe() -> None:
    assert printed_steps(training_output(34)) == [1, 10, 20, 30, 34]


def test_plain_lines_are_aligned() -> None:
    small, large = plain_line(1, 200, metrics(1)), plain_line(200, 200, {**metrics(200), "kl/mean": 12.0})
    assert len(small) == len(large)
    assert small.index("beta") == large.index("beta")


def test_a_value_that_was_not_measured_is_a_dash() -> None:
    line = plain_line(1, 2, {"reward/mean": 0.5})
    assert "reward  0.500" in line
    assert "kl         -" in line


def test_a_pipe_never_sees_an_escape_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with open_console(stream) as console:
        with console.phase("loading engines"):
            console.progress(5, 10, "shard \x1b[31m5")
        with console.training(1):
            console.step(1, metrics(1))
            console.sample(1, scored_group("\x1b[2J"))
        console.eval(1, "counting", 0.5, 0.4, 0.6, 100)
        console.finish(BEFORE, AFTER, {"report": Path("runs/x/report.html")}, 12.0)
    assert "\x1b" not in stream.getvalue()
    assert "loading engines" in stream.getvalue()


def test_ci_gets_plain_lines_even_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert "\x1b" not in training_output(3, stream=TerminalStream())


def test_a_terminal_gets_a_live_view_with_a_bar() -> None:
    output = training_output(3, stream=TerminalStream())
    assert "\x1b" in output
    assert "3/3" in output
    assert "audit gap" in output


def test_a_phase_prints_its_name_and_its_duration() -> None:
    stream = io.StringIO()
    with open_console(stream) as console, console.phase("starting Ray"):
        time.sleep(0.05)
    first, last = stream.getvalue().splitlines()
    assert first == "starting Ray ..."
    assert last.startswith("starting Ray: 0.") and last.endswith(" s")


def test_a_failing_phase_prints_that_it_stopped_and_raises() -> None:
    stream = io.StringIO()
    with open_console(stream) as console, pytest.raises(RuntimeError, match="no GPU"), console.phase("starting Ray"):
        raise RuntimeError("no GPU")
    assert "starting Ray: stopped after" in stream.getvalue()


def test_progress_on_a_pipe_is_at_most_ten_lines() -> None:
    stream = io.StringIO()
    with open_console(stream) as console, console.phase("warming up"):
        for done in range(1, 201):
            console.progress(done, 200, "loss 0.43")
    shown = [line for line in stream.getvalue().splitlines() if "loss" in line]
    assert len(shown) == 10
    assert shown[0] == "  20/200 loss 0.43"
    assert shown[-1] == "  200/200 loss 0.43"


def test_a_phase_inside_training_keeps_the_live_view() -> None:
    stream = TerminalStream()
    with open_console(stream) as console, console.training(2):
        console.step(1, metrics(1))
        with console.phase("evaluating"):
            console.progress(3, 7)
        console.step(2, metrics(2))
    assert "2/2" in stream.getvalue()


def test_the_latest_values_show_tokens_time_split_and_evaluation() -> None:
    evaluation = EvalAccuracy(step=10, data="counting", accuracy=0.58, lo=0.51, hi=0.65, n=200)
    text = rendered(latest_values([metrics(1), metrics(2)], evaluation))
    assert "1,000" in text
    assert "generate 50 %" in text
    assert "58.0 % (95 % interval 51.0 to 65.0, 200 questions)" in text
    assert "counting, step 10" in text


def test_markup_in_a_question_is_shown_as_it_is() -> None:
    assert "How many [red] things?" in rendered(sample_panel(Sample.first_of(1, scored_group("[bold]3[/bold]"))))
    assert "[bold]3[/bold]" in rendered(sample_panel(Sample.first_of(1, scored_group("[bold]3[/bold]"))))


def test_a_model_cannot_write_terminal_codes() -> None:
    assert "\x1b" not in rendered(sample_panel(Sample.first_of(1, scored_group("\x1b[2J\x07 3"))))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([2.0], "▁"),
        ([1.0, 1.0], "▁▁"),
        ([0.0, 7.0], "▁█"),
        ([0.0, float("nan"), 7.0], "▁█"),
        ([0.1 + 0.2, 0.3], "▁▁"),
    ],
)
def test_a_sparkline_spans_its_own_range(values: list[float], line: str) -> None:
    assert sparkline(values) == line


def test_a_sparkline_of_a_long_history_keeps_its_width() -> None:
    assert len(sparkline([float(i) for i in range(1000)], width=16)) == 16


def test_the_closing_table_gives_before_after_change_and_paths() -> None:
    stream = io.StringIO()
    with open_console(stream) as console:
        console.finish(BEFORE, AFTER, {"report": Path("runs/x/report.html"), "export": Path("runs/x/export")}, 372.0)
    output = stream.getvalue()
    for fact in ("46.0 %", "66.0 %", "+20.0 points", "39.2 to 52.9", "59.2 to 72.2", "24.1", "-1.1"):
        assert fact in output
    assert "report  runs/x/report.html" in output
    assert "done in 6 min 12 s" in output


def test_a_long_path_stays_on_one_line() -> None:
    stream = io.StringIO()
    path = Path("runs") / ("x" * 200) / "report.html"
    with open_console(stream) as console:
        console.finish(BEFORE, AFTER, {"report": path}, 1.0)
    assert str(path) in stream.getvalue()


TRAIN_FOREVER = """
import signal, time
from othink_ray.driver.live_console import open_console
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
with open_console() as console, console.training(9):
    console.step(1, {"reward/mean": 1.0})
    time.sleep(60)
"""


def read_until(terminal: int, wanted: bytes, *, within_s: float) -> bytes:
    output = b""
    for chunk in chunks(terminal, within_s):
        output += chunk
        if wanted in output:
            break
    return output


def chunks(terminal: int, within_s: float) -> Iterator[bytes]:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            yield os.read(terminal, 4096)
        except OSError:  # Linux raises it when the other side is closed
            return


def environment() -> Mapping[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_ctrl_c_restores_the_cursor() -> None:
    reader, writer = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", TRAIN_FOREVER], stdout=writer, stderr=writer, stdin=writer, env=environment()
    )
    os.close(writer)
    try:
        started = read_until(reader, b"1/9", within_s=30)
        child.send_signal(signal.SIGINT)
        ended = read_until(reader, b"KeyboardInterrupt", within_s=30)
    finally:
        child.kill()
        child.wait()
        os.close(reader)
    assert b"\x1b[?25l" in started
    assert b"\x1b[?25h" in ended


def test_the_matrix_has_models_as_rows_and_data_as_columns() -> None:
    cell = {"lo": 0.4, "hi": 0.6}
    results = [
        cell | {"model": "runs/a", "data": "counting", "accuracy": 0.5},
        cell | {"model": "runs/a", "data": "geometry", "accuracy": 0.25},
        cell | {"model": "runs/b", "data": "counting", "accuracy": 1.0},
    ]
    header, first, second = rendered(matrix(results, boxed=False)).splitlines()[:3]
    assert header.split() == ["greedy", "accuracy", "counting", "geometry"]
    assert first.split("  ")[0] == "runs/a" and "50.0 % (40.0 to 60.0)" in first and "25.0 %" in first
    assert "100.0 %" in second and second.count("%") == 1

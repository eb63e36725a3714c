"""Console output of a run as plain lines, with the tables at its end; live_console.py has the view for terminals."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TextIO, cast

from rich import box
from rich.console import Console as Terminal
from rich.table import Table
from rich.text import Text

from othink_ray.driver.stopping import raise_if_interrupted
from othink_ray.types import ScoredGroup

PLAIN_PROGRESS_LINES = 10  # at most, for each phase
LINES_FOR_EVERY_STEP = 20  # a run of at most this many steps prints each one
LINE_SPACING = 10  # otherwise every tenth step


class Output:
    """A stream that discards its output, without an error, once its terminal is closed or its pipe has no reader."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _silence(self) -> None:
        """Redirect the descriptor to /dev/null, because Python flushes the buffered rest again at exit."""
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self._stream.fileno())
        os.close(devnull)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalAccuracy:
    """Accuracy on n held-out questions with its 95 % interval, as fractions of 1."""

    step: int
    data: str
    accuracy: float
    lo: float
    hi: float
    n: int


class Console:
    """Output of a whole run: phases before training, steps, evaluations, the closing table.

    Steps count from 1: `step(s, ...)` is called when s of the total steps are done.
    """

    interactive: ClassVar[bool] = False

    def __init__(self, stream: TextIO | None = None) -> None:
        self._terminal = Terminal(
            file=cast("TextIO", Output(sys.stdout if stream is None else stream)),
            force_terminal=self.interactive,
            color_system="auto" if self.interactive else None,
            highlight=False,
        )
        self._progress_lines = 0
        self._total_steps = 0
        self._first_step = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restore the terminal."""

    def say(self, text: str) -> None:
        """Print one line, above the live view if there is one."""
        self._terminal.print(Text(printable(text)), soft_wrap=True)

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Show the name of a phase and, at its end, its duration."""
        raise_if_interrupted()
        started = time.monotonic()
        self._progress_lines = 0
        self._begin_phase(title)
        try:
            yield
        except BaseException:
            self.close()
            self.say(f"{title}: stopped after {duration(time.monotonic() - started)}")
            raise
        self.close()
        self.say(f"{title}: {duration(time.monotonic() - started)}")

    def _begin_phase(self, title: str) -> None:
        self.say(f"{title} ...")

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Show the progress of the current phase."""
        raise_if_interrupted()
        lines_due = PLAIN_PROGRESS_LINES * done // max(total, 1)
        if lines_due > self._progress_lines:
            self._progress_lines = lines_due
            self.say(f"  {done}/{total} {text}".rstrip())

    @contextmanager
    def training(self, total_steps: int, *, done: int = 0) -> Iterator[None]:
        """Enclose the training loop; `done` steps of a resumed run count as done."""
        self._total_steps, self._first_step = total_steps, True
        yield

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step; the keys of `metrics` are the names in metrics.jsonl."""
        raise_if_interrupted()
        if self._first_step or self._line_is_due(step):
            self.say(plain_line(step, self._total_steps, metrics))
        self._first_step = False

    def _line_is_due(self, step: int) -> bool:
        return self._total_steps <= LINES_FOR_EVERY_STEP or step % LINE_SPACING == 0 or step == self._total_steps

    def sample(self, step: int, scored: ScoredGroup) -> None:
        """Show the latest question with one of its answers, in the live view only."""

    def eval(self, step: int, data: str, accuracy: float, lo: float, hi: float, n: int) -> None:
        """Show accuracy on a data set's held-out questions with its 95 % interval, all three as fractions of 1."""
        self._show_evaluation(EvalAccuracy(step=step, data=data, accuracy=accuracy, lo=lo, hi=hi, n=n))

    def _show_evaluation(self, evaluation: EvalAccuracy) -> None:
        self.say(f"held-out accuracy after step {evaluation.step}, {evaluation.data}: {evaluation_text(evaluation)}")

    def finish(
        self,
        before: Mapping[str, float],
        after: Mapping[str, float],
        paths: Mapping[str, Path],
        seconds: float,
    ) -> None:
        """Print accuracy before and after (as in summary.json), and the paths of the results."""
        self.close()
        self._terminal.print()
        self._terminal.print(closing_table(before, after, boxed=self.interactive))
        self._terminal.print()
        width = max((len(name) for name in paths), default=0)
        for name, path in paths.items():
            self.say(f"{name:<{width}}  {path}")
        self.say(f"done in {duration(seconds)}")

    def matrix(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Print the results of mode=eval, models by data sets."""
        self._terminal.print()
        self._terminal.print(matrix(results, boxed=self.interactive))
        self._terminal.print()


def printable(text: str) -> str:
    """Replace control characters: a model may write sequences that move the cursor or color the terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def duration(seconds: float) -> str:
    """Format seconds like "12.3 s", "4 min 05 s" or "2 h 07 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {whole_seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def evaluation_text(evaluation: EvalAccuracy) -> str:
    """Format like "66.0 % (95 % interval 59.2 to 72.2, 200 questions)"."""
    return (
        f"{100 * evaluation.accuracy:.1f} % "
        f"(95 % interval {100 * evaluation.lo:.1f} to {100 * evaluation.hi:.1f}, {evaluation.n} questions)"
    )


def tokens_per_second(metrics: Mapping[str, float]) -> float | None:
    """Return answer tokens per second over the whole step; None if not measured."""
    try:
        return metrics["throughput/samples_per_s"] * metrics["tokens/completion_mean"]
    except KeyError:
        return None


def plain_line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """Return one aligned line without colors; a value that was not measured is a dash."""
    speed = [
        ("tok/s", _fixed(tokens_per_second(metrics), "7.0f")),
        ("s", _fixed(metrics.get("time/step_s"), "6.2f")),
    ]
    fields = [
        ("reward", _fixed(metrics.get("reward/mean"), "6.3f")),
        ("acc", _fixed(metrics.get("reward/accuracy"), "5.3f")),
        ("fmt", _fixed(metrics.get("reward/format"), "5.3f")),
        ("beta", _fixed(metrics.get("kl/beta"), "6.4f")),
        ("kl", _fixed(metrics.get("kl/mean"), "9.2e")),
        ("gap", _fixed(metrics.get("audit/logp_gap_max"), "8.1e")),
    ]
    if is_sft(metrics):
        names = {"loss": "loss", "entropy": "entropy", "grad": "grad_norm", "lr": "lr"}
        fields = [(label, _fixed(metrics.get(name), "8.2e")) for label, name in names.items()]
    return f"step {step:>{len(str(total))}}/{total}  " + "  ".join(f"{name} {value}" for name, value in fields + speed)


def is_sft(metrics: Mapping[str, float]) -> bool:
    """Return whether these are the metrics of an SFT step: the only kind without `reward/mean`."""
    return "reward/mean" not in metrics


def _fixed(value: float | None, spec: str) -> str:
    width = int(spec.partition(".")[0])
    return f"{'-':>{width}}" if value is None else f"{value:{spec}}"


def matrix(results: Sequence[Mapping[str, Any]], *, boxed: bool) -> Table:
    """Return a table of each model's greedy accuracy on each data set, with its 95 % interval."""
    cells = {(result["model"], result["data"]): result for result in results}
    data_sets = dict.fromkeys(result["data"] for result in results)
    table = Table(box=box.ROUNDED if boxed else None, pad_edge=boxed)
    table.add_column("greedy accuracy")
    for data in data_sets:
        table.add_column(data, justify="right")
    for model in dict.fromkeys(result["model"] for result in results):
        row = [cells.get((model, data)) for data in data_sets]
        shares = ("" if cell is None else f"{_share(cell['accuracy'])} ({_range(cell)})" for cell in row)
        table.add_row(model, *shares)
    return table


def closing_table(before: Mapping[str, float], after: Mapping[str, float], *, boxed: bool) -> Table:
    """Return a table of results before and after training on the same held-out questions."""

    def points(name: str) -> str:
        return f"{100 * (after[name] - before[name]):+.1f} points"

    table = Table(box=box.ROUNDED if boxed else None, pad_edge=boxed)
    table.add_column("held-out")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    table.add_row("accuracy", _share(before["accuracy"]), _share(after["accuracy"]), points("accuracy"), style="bold")
    table.add_row("95 % interval", _range(before), _range(after), "")
    table.add_row("format", _share(before["format"]), _share(after["format"]), points("format"))
    lengths = before["tokens_mean"], after["tokens_mean"]
    table.add_row("answer tokens", *(f"{length:.1f}" for length in lengths), f"{lengths[1] - lengths[0]:+.1f}")
    table.add_row("questions", f"{before['n']:.0f}", f"{after['n']:.0f}", "")
    return table


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _range(result: Mapping[str, Any]) -> str:
    return f"{100 * result['lo']:.1f} to {100 * result['hi']:.1f}"

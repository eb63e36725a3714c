"""Console output of a run: a live view on a terminal, plain lines otherwise."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, cast

from rich.console import Console as Terminal
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from othink_ray.driver.stopping import raise_if_interrupted
from othink_ray.driver.views import (
    EvalAccuracy,
    Sample,
    closing_table,
    duration,
    evaluation_text,
    latest_values,
    matrix,
    plain_line,
    printable,
    sample_panel,
)
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


class _Count(MofNCompleteColumn):
    """Shows "done/total" if the total is known, otherwise nothing."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class Console:
    """Output of a whole run: phases before training, the training view, evaluations, the closing table.

    Steps count from 1: `step(s, ...)` is called when s of the total steps are done.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        output = Output(sys.stdout if stream is None else stream)
        self.interactive = output.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
        self._terminal = Terminal(
            file=cast("TextIO", output),
            force_terminal=self.interactive,
            color_system="auto" if self.interactive else None,
            highlight=False,
        )
        self._live: Live | None = None
        self._progress: Progress
        self._task: TaskID
        self._progress_lines = 0
        self._total_steps = 0
        self._history: list[Mapping[str, float]] = []
        self._evaluation: EvalAccuracy | None = None
        self._sample: Sample | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restore the terminal."""
        self._stop_live()

    def say(self, text: str) -> None:
        """Print one line, above the live view if there is one."""
        self._terminal.print(Text(printable(text)), soft_wrap=True)

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Show the name of a phase and, at its end, its duration; during training it is a progress bar."""
        raise_if_interrupted()
        if self._live is not None:
            outer, self._task = self._task, self._progress.add_task(title, total=None, text="")
            try:
                yield
            finally:
                self._progress.remove_task(self._task)
                self._task = outer
            return
        started = time.monotonic()
        self._progress_lines = 0
        if self.interactive:
            self._start_live(title, total=None)
        else:
            self.say(f"{title} ...")
        try:
            yield
        except BaseException:
            self._stop_live()
            self.say(f"{title}: stopped after {duration(time.monotonic() - started)}")
            raise
        self._stop_live()
        self.say(f"{title}: {duration(time.monotonic() - started)}")

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Show the progress of the current phase."""
        raise_if_interrupted()
        if self._live is not None:
            self._progress.update(self._task, completed=done, total=total, text=printable(text))
            return
        lines_due = PLAIN_PROGRESS_LINES * done // max(total, 1)
        if not self.interactive and lines_due > self._progress_lines:
            self._progress_lines = lines_due
            self.say(f"  {done}/{total} {text}".rstrip())

    @contextmanager
    def training(self, total_steps: int, *, done: int = 0) -> Iterator[None]:
        """The live view around the training loop; `done` steps of a resumed run count as done."""
        self._total_steps = total_steps
        self._history.clear()
        if self.interactive:
            self._start_live("training", total=total_steps, done=done)
            self._refresh()
        try:
            yield
        finally:
            self._stop_live()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step, under their names in metrics.jsonl."""
        raise_if_interrupted()
        self._history.append(metrics)
        if self._live is not None:
            self._progress.update(self._task, completed=step, text=self._time_left(step))
            self._refresh()
        elif self._line_is_due(step):
            self.say(plain_line(step, self._total_steps, metrics))

    def sample(self, step: int, scored: ScoredGroup) -> None:
        """Show the latest question with one of its answers, in the live view only."""
        self._sample = Sample.first_of(step, scored)
        if self._live is not None:
            self._refresh()

    def eval(self, step: int, data: str, accuracy: float, lo: float, hi: float, n: int) -> None:
        """Show accuracy on a data set's held-out questions with its 95 % interval, all three as fractions of 1."""
        self._evaluation = EvalAccuracy(step=step, data=data, accuracy=accuracy, lo=lo, hi=hi, n=n)
        if self._live is not None:
            self._refresh()
        else:
            self.say(f"held-out accuracy after step {step}, {data}: {evaluation_text(self._evaluation)}")

    def finish(
        self,
        before: Mapping[str, float],
        after: Mapping[str, float],
        paths: Mapping[str, Path],
        seconds: float,
    ) -> None:
        """Print accuracy before and after (as in summary.json), and the paths of the results."""
        self._stop_live()
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

    def _line_is_due(self, step: int) -> bool:
        first = len(self._history) == 1
        return (
            first or self._total_steps <= LINES_FOR_EVERY_STEP or step % LINE_SPACING == 0 or step == self._total_steps
        )

    def _time_left(self, step: int) -> str:
        """Return the steps left times the mean time of the last steps, which is right after a resume, too."""
        recent = [metrics["time/step_s"] for metrics in self._history[-LINE_SPACING:] if "time/step_s" in metrics]
        if not recent:
            return ""
        return f"{duration((self._total_steps - step) * sum(recent) / len(recent))} left"

    def _start_live(self, title: str, *, total: int | None, done: int = 0) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            _Count(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=self._terminal,
            expand=True,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, text="")
        self._live = Live(self._progress, console=self._terminal, refresh_per_second=4, transient=True)
        self._live.start()

    def _refresh(self) -> None:
        assert self._live is not None
        parts: list[RenderableType] = [self._progress, latest_values(self._history, self._evaluation)]
        if self._sample is not None:
            parts.append(sample_panel(self._sample))
        self._live.update(Stack(*parts))

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

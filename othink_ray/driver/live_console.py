"""Console on a terminal: a live view of the current phase and, in training, of the latest metrics and answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self, TextIO

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.live import Live
from rich.panel import Panel
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
from rich.table import Table
from rich.text import Text

from othink_ray.driver.console import (
    LINE_SPACING,
    Console,
    EvalAccuracy,
    duration,
    evaluation_text,
    is_sft,
    printable,
    tokens_per_second,
)
from othink_ray.driver.stopping import raise_if_interrupted
from othink_ray.types import ScoredGroup

SPARK_LEVELS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 10
BAR_WIDTH = 20
ANSWER_CHARACTERS = 600
PARTS_OF_A_STEP = ("generate", "score", "update", "push")
PART_STYLES = ("cyan", "yellow", "magenta", "green")


def open_console(stream: TextIO | None = None) -> Console:
    """Return the console for a stream (default: standard output): live on a terminal, plain lines elsewhere."""
    stream = sys.stdout if stream is None else stream
    live = stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
    return LiveConsole(stream) if live else Console(stream)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A question and the first of its answers."""

    step: int
    question: str
    truth: str
    answer: str
    reward: float

    @classmethod
    def first_of(cls, step: int, scored: ScoredGroup) -> Self:
        prompt = scored.group.prompt
        return cls(
            step=step,
            question=" ".join(message.text for message in prompt.messages if message.role == "user"),
            truth=prompt.answer,
            answer=scored.group.completions[0].text,
            reward=float(scored.rewards[0]),
        )


class _Count(MofNCompleteColumn):
    """Shows "done/total" if the total is known, otherwise nothing."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class LiveConsole(Console):
    """Shows phases and training in a view that is redrawn in place; other lines are printed above it."""

    interactive: ClassVar[bool] = True

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._live: Live | None = None
        self._progress: Progress
        self._task: TaskID
        self._history: list[Mapping[str, float]] = []
        self._evaluation: EvalAccuracy | None = None
        self._sample: Sample | None = None

    def close(self) -> None:
        """Remove the live view and restore the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Show a phase as the live view, during training as a second progress bar."""
        if self._live is None:
            with super().phase(title):
                yield
            return
        raise_if_interrupted()
        outer, self._task = self._task, self._progress.add_task(title, total=None, text="")
        try:
            yield
        finally:
            self._progress.remove_task(self._task)
            self._task = outer

    def _begin_phase(self, title: str) -> None:
        self._start_live(title, total=None)

    def progress(self, done: int, total: int, text: str = "") -> None:
        raise_if_interrupted()
        if self._live is not None:
            self._progress.update(self._task, completed=done, total=total, text=printable(text))

    @contextmanager
    def training(self, total_steps: int, *, done: int = 0) -> Iterator[None]:
        self._total_steps = total_steps
        self._history.clear()
        self._start_live("training", total=total_steps, done=done)
        self._refresh()
        try:
            yield
        finally:
            self.close()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        raise_if_interrupted()
        self._history.append(metrics)
        self._progress.update(self._task, completed=step, text=self._time_left(step))
        self._refresh()

    def sample(self, step: int, scored: ScoredGroup) -> None:
        self._sample = Sample.first_of(step, scored)
        self._refresh()

    def _show_evaluation(self, evaluation: EvalAccuracy) -> None:
        self._evaluation = evaluation
        if self._live is None:
            super()._show_evaluation(evaluation)
        self._refresh()

    def _time_left(self, step: int) -> str:
        """Return the remaining time as text, from the mean of the last steps; steps before a resume do not count."""
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
        if self._live is None:
            return
        parts: list[RenderableType] = [self._progress, latest_values(self._history, self._evaluation)]
        if self._sample is not None:
            parts.append(sample_panel(self._sample))
        self._live.update(Stack(*parts))


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """Draw the whole history in `width` characters, scaled from its lowest to its highest value."""
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    if span <= 1e-9 * max(map(abs, means)):  # equal up to rounding: draw a flat line, not noise
        return SPARK_LEVELS[0] * count
    top = len(SPARK_LEVELS) - 1
    return "".join(SPARK_LEVELS[round(top * (mean - low) / span)] for mean in means)


def latest_values(history: Sequence[Mapping[str, float]], evaluation: EvalAccuracy | None) -> Table:
    """Return a table of latest values and sparklines, the last evaluation and the split of the step's time."""

    def cells(label: str, values: Sequence[float | None], spec: str) -> tuple[str, Text, Text]:
        known = [value for value in values if value is not None]
        latest = f"{known[-1]:{spec}}" if known else "-"
        return label, Text(latest, style="bold", justify="right"), Text(sparkline(known), style="cyan")

    def column(name: str) -> list[float | None]:
        return [metrics.get(name) for metrics in history]

    grid = Table.grid(padding=(0, 2))
    rows = [
        (cells("reward", column("reward/mean"), ".3f"), cells("beta", column("kl/beta"), ".4f")),
        (cells("accuracy", column("reward/accuracy"), ".3f"), cells("KL", column("kl/mean"), ".2e")),
        (
            cells("format", column("reward/format"), ".3f"),
            cells("audit gap", column("audit/logp_gap_max"), ".1e"),
        ),
    ]
    if history and is_sft(history[-1]):
        rows = [
            (cells("loss", column("loss"), ".4f"), cells("entropy", column("entropy"), ".2e")),
            (cells("gradient", column("grad_norm"), ".2e"), cells("lr", column("lr"), ".1e")),
        ]
    speed = [tokens_per_second(metrics) for metrics in history]
    rows.append((cells("s/step", column("time/step_s"), ".2f"), cells("tokens/s", speed, ",.0f")))
    for left, right in rows:
        grid.add_row(*left, *right)
    table = Table.grid()
    table.add_row("")
    table.add_row(grid)
    table.add_row("")
    if evaluation is not None:
        table.add_row(Text(f"held-out {evaluation.data}, step {evaluation.step}: {evaluation_text(evaluation)}"))
    if history:
        table.add_row(time_split(history[-1]))
    return table


def time_split(metrics: Mapping[str, float]) -> Text:
    """Return a bar of the last step's time with one color per phase, and a legend in percent."""
    seconds = [metrics.get(f"time/{part}_s", 0.0) for part in PARTS_OF_A_STEP]
    total = sum(seconds)
    if not total > 0:
        return Text("")
    bar, legend = Text(), Text()
    for part, spent, style in zip(PARTS_OF_A_STEP, seconds, PART_STYLES, strict=True):
        bar.append("█" * round(BAR_WIDTH * spent / total), style=style)
        legend.append(f"  {part} {100 * spent / total:.0f} %", style=style)
    return bar + legend


def sample_panel(sample: Sample) -> Panel:
    """Return a panel with question, reference answer, model answer and reward."""
    answer = printable(sample.answer)
    if len(answer) > ANSWER_CHARACTERS:
        answer = answer[:ANSWER_CHARACTERS] + " …"
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("question", style="dim"), Text(printable(sample.question)))
    grid.add_row(Text("truth", style="dim"), Text(printable(sample.truth)))
    grid.add_row(Text("answer", style="dim"), Text(answer))
    grid.add_row(Text("reward", style="dim"), Text(f"{sample.reward:.2f}", style="bold"))
    return Panel(grid, title=f"latest sample, step {sample.step}", title_align="left", border_style="dim")

"""Renderings for the console: the plain line of a step, the live table, the sample panel, the closing table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from othink_ray.types import ScoredGroup

SPARK_LEVELS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 10
BAR_WIDTH = 20
ANSWER_CHARACTERS = 600
PARTS_OF_A_STEP = ("generate", "score", "update", "push")
PART_STYLES = ("cyan", "yellow", "magenta", "green")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalAccuracy:
    """Accuracy on n held-out questions with its 95 % interval, as fractions of 1."""

    step: int
    data: str
    accuracy: float
    lo: float
    hi: float
    n: int


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
    """Return whether the metrics are of an SFT step, which has no rewards."""
    return "reward/mean" not in metrics


def _fixed(value: float | None, spec: str) -> str:
    width = int(spec.partition(".")[0])
    return f"{'-':>{width}}" if value is None else f"{value:{spec}}"


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
    """Return a bar of the last step's time, one color per verb."""
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


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _range(result: Mapping[str, Any]) -> str:
    return f"{100 * result['lo']:.1f} to {100 * result['hi']:.1f}"


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

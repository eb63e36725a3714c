"""Rows of the table of endings: exit status, last line, files and what a restart does."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from tests.drills.faults import steps_done
from tests.drills.harness import Outcome

STEPS = 20  # few enough that each is printed
SETTINGS = (f"train.steps={STEPS}", "train.checkpoint_every=5", "run.resume=auto")
IN_A_STEP = f"step  9/{STEPS}"
STUDY = (
    *("mode=study", "study=beta", "study.betas=[0.02]", "study.size=small"),
    *("study.geometry.data=counting", "study.counting.data=both"),
)
IN_A_STUDY = "GR-grpo-alpha1-beta0.02-seed0: started"
_PREFIXES = ("stopped: ", "interrupted", "stopped on request: ", "done in ", "report: ", "[slurm] ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Observed ending; `wrong` is empty if it is the expected one."""

    status: str
    last_line: str
    on_disk: str
    next_command: str
    wrong: str


@dataclass(frozen=True, slots=True)
class Table:
    """Table of endings in a Markdown file, and the outcome of each row."""

    file: Path
    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, what: str, ended: Ended) -> None:
        if not self.outcomes:
            head = ("what happens", "exit status", "last line", "on disk", "the same command again")
            self.file.write_text(f"| {' | '.join(head)} |\n{'|---' * len(head)}|\n")
        cells = (what, ended.status, f"`{ended.last_line}`", ended.on_disk, ended.next_command)
        with self.file.open("a") as file:
            file.write(f"| {' | '.join(cells)} |\n")
        unknown = float("nan")
        self.outcomes.append(
            Outcome(
                fault=what,
                number=len(self.outcomes),
                noticed_after_s=unknown,
                recovered_after_s=unknown,
                steps_lost=0,
                samples_masked=0,
                wrong=ended.wrong,
            )
        )


def last_line(output: str, run_dir: Path) -> str:
    """Return the last line that says how the run ended, with RUN, ADDRESS and '... s' for what varies."""
    lines = [line for line in output.splitlines() if line.startswith(_PREFIXES)] or ["nothing of its end"]
    last = lines[-1].replace(str(run_dir), "RUN")
    return re.sub(r"\d+(\.\d+)? s\b", "... s", re.sub(r"\d+(\.\d+){3}:\d+", "ADDRESS", last))


def on_disk(run_dir: Path) -> str:
    if (study := run_dir / "study.json").exists():
        runs = json.loads(study.read_text())["runs"]
        return f"{sum(run['status'] == 'done' for run in runs)} of {len(runs)} runs, report"
    if answers := list(run_dir.glob("answers/*/*.jsonl")):
        return f"{sum(len(file.read_text().splitlines()) - 1 for file in answers)} answers"  # below a line of settings
    steps = [int(path.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/step_*") if not path.suffix]
    parts = [f"checkpoint of step {max(steps)}" if steps else "no checkpoint", f"{steps_done(run_dir)} steps logged"]
    there = {"report": run_dir / "report.html", "export": run_dir / "export" / "config.json"}
    return ", ".join([*parts, *(name for name, path in there.items() if path.exists())])


def goes_on(output: str) -> str:
    """Return where the run with this output started: afresh or from a step, a run or a question."""
    if runs := re.findall(r"^(\S+): started", output, re.MULTILINE):
        return "starts afresh" if "base" in runs else "goes on with the runs that are left"
    if left := re.search(r"^evaluating (\d+) questions", output, re.MULTILINE):
        return f"evaluates the {left[1]} questions that are left"
    resumed = re.search(r"^resuming (after step \d+)", output, re.MULTILINE)
    return f"goes on {resumed[1]}" if resumed else "starts afresh"

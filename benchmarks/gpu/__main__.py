"""Whether all that a CPU cannot show works on this GPU, and how fast:  python -m benchmarks.gpu --help"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.rows import Row
from benchmarks.gpu.table import table
from othink_ray.atomic_write import atomic_write

NO_GPU = 2
_STOP_SECONDS = 10  # for a part to clean up, before it is killed


def main(arguments: Sequence[str]) -> int:
    asked = _parser().parse_args(arguments)
    reason = _no_gpu()
    if reason is not None:
        print(f"no GPU to check: {reason}", file=sys.stderr)
        return NO_GPU
    with tempfile.TemporaryDirectory(prefix="gpu_check_", dir=asked.scratch) as scratch:
        rows = check(asked.only, asked.json.absolute(), Path(scratch), 60 * asked.minutes)
    print(f"\n{table(rows)}\n\nfigures {asked.json}")
    return 1 if any(row["state"] == "failed" for row in rows) else 0


def check(names: Sequence[str], kept: Path, scratch: Path, seconds: float) -> list[dict[str, Any]]:
    """A row a setting of each part. What is known is in the file `kept` as soon as its part is over."""
    until = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    for name in names:
        found = _part(name, PARTS[name], scratch, until - time.monotonic())
        rows += [{"part": name, **row.record()} for row in found]
        atomic_write(kept, json.dumps(rows, indent=1))
        print(table(rows[len(rows) - len(found) :]).split("\n", 1)[1], flush=True)
        _keep_others(scratch, kept.parent)
    return rows


def _part(name: str, part: Part, scratch: Path, left: float) -> list[Row]:
    missing = part.missing()
    if missing:
        return [Row(setting="", state="skipped", error=f"needs {', '.join(missing)}, not installed here")]
    if left <= 0:
        return [Row(setting="", state="skipped", error="no time left: a longer --minutes, or --only")]
    limit = min(part.seconds, left)
    command = [sys.executable, "-m", "benchmarks.gpu.parts", name, str(scratch)]
    return run_part(command, scratch / f"{name.replace(' ', '_')}.txt", limit)


def run_part(command: Sequence[str], log: Path, limit: float) -> list[Row]:
    """The rows that a process says, and one more where it did not end well within `limit` seconds."""
    with log.open("wb") as screen:
        process = subprocess.Popen(command, stdout=screen, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            ending = None if code in (0, 1) else f"ended with {code}"
        except subprocess.TimeoutExpired:
            ending = f"not done in {limit:.0f} s"
        finally:
            _end(process)
    lines = log.read_text(errors="replace").splitlines()
    rows = [Row(**json.loads(line)) for line in lines if line.startswith('{"setting"')]
    if ending is None and not rows:
        ending = "said nothing"
    if ending is not None:
        last = next((line for line in reversed(lines) if line.strip() and not line.startswith('{"setting"')), "")
        rows.append(Row(setting="", state="failed", error=": ".join([ending, *([last.strip()] if last else [])])))
    return rows


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started in its session."""
    for sign in (signal.SIGTERM, signal.SIGKILL) if process.poll() is None else (signal.SIGKILL,):
        try:
            os.killpg(process.pid, sign)
            process.wait(_STOP_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _keep_others(scratch: Path, folder: Path) -> None:
    """What parts wrote for people goes beside the figures."""
    for text in scratch.glob("*.txt"):
        (folder / "gpu_check").mkdir(exist_ok=True)
        text.replace(folder / "gpu_check" / text.name)


def _no_gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; name a Python that has: PYTHON=/path/to/python launch/gpu_check.sh"
    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} of {sys.executable} sees none; it needs a CUDA build, a driver and a device"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/gpu_check.sh", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="file for the figures")
    parser.add_argument("--minutes", type=float, default=9.5, help="after which no part is going on")
    parser.add_argument("--scratch", help="folder for models of random weights, 12 GB; else the system's own")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

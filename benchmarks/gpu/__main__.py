"""Check on this GPU everything that a CPU cannot show, and how fast it is:  python -m benchmarks.gpu --help"""

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
_STOP_SECONDS = 10  # grace period between SIGTERM and SIGKILL


def main(arguments: Sequence[str]) -> int:
    args = _parser().parse_args(arguments)
    reason = _no_gpu()
    if reason is not None:
        print(f"no GPU to check: {reason}", file=sys.stderr)
        return NO_GPU
    with tempfile.TemporaryDirectory(prefix="gpu_check_", dir=args.scratch) as scratch:
        rows = check(args.only, args.json.absolute(), Path(scratch), 60 * args.minutes)
    print(f"\n{table(rows)}\n\nfigures {args.json}")
    return 1 if any(row["state"] == "failed" for row in rows) else 0


def check(names: Sequence[str], output: Path, scratch: Path, seconds: float) -> list[dict[str, Any]]:
    """Run the named parts and return a row per setting; the file `output` is updated after each part."""
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    for name in names:
        new_rows = _part(name, PARTS[name], scratch, deadline - time.monotonic())
        rows += [{"part": name, **row.record()} for row in new_rows]
        atomic_write(output, json.dumps(rows, indent=1))
        print(table(rows[len(rows) - len(new_rows) :]).split("\n", 1)[1], flush=True)
        _keep_texts(scratch, output.parent)
    return rows


def _part(name: str, part: Part, scratch: Path, seconds_left: float) -> list[Row]:
    missing = part.missing()
    if missing:
        return [Row(setting="", state="skipped", error=f"needs {', '.join(missing)}, not installed here")]
    if seconds_left <= 0:
        return [Row(setting="", state="skipped", error="no time left; raise --minutes or select parts with --only")]
    limit = min(part.seconds, seconds_left)
    command = [sys.executable, "-m", "benchmarks.gpu.parts", name, str(scratch)]
    return run_part(command, scratch / f"{name.replace(' ', '_')}.txt", limit)


def run_part(command: Sequence[str], log: Path, limit: float) -> list[Row]:
    """Return the rows that a process prints, and a failed one unless it exits cleanly within `limit` seconds."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            problem = None if code in (0, 1) else f"exited with status {code}"
        except subprocess.TimeoutExpired:
            problem = f"timed out after {limit:.0f} s"
        finally:
            _end(process)
    lines = log.read_text(errors="replace").splitlines()
    rows = [Row(**json.loads(line)) for line in lines if line.startswith('{"setting"')]
    if problem is None and not rows:
        problem = "printed no rows"
    if problem is not None:
        last = next((line for line in reversed(lines) if line.strip() and not line.startswith('{"setting"')), "")
        rows.append(Row(setting="", state="failed", error=": ".join([problem, *([last.strip()] if last else [])])))
    return rows


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process and everything in its session."""
    for number in (signal.SIGTERM, signal.SIGKILL) if process.poll() is None else (signal.SIGKILL,):
        try:
            os.killpg(process.pid, number)
            process.wait(_STOP_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _keep_texts(scratch: Path, folder: Path) -> None:
    """Move the parts' logs and text files to the folder gpu_check beside the figures."""
    for text in scratch.glob("*.txt"):
        (folder / "gpu_check").mkdir(exist_ok=True)
        text.replace(folder / "gpu_check" / text.name)


def _no_gpu() -> str | None:
    """Return why no GPU can be used, or None."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; choose a Python that has it: PYTHON=/path/to/python launch/gpu_check.sh"
    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} of {sys.executable} finds none; it needs a CUDA build, a driver and a device"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/gpu_check.sh", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="file for the figures")
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit for all parts")
    parser.add_argument("--scratch", help="folder for 12 GB of random weights; else the system's temporary folder")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

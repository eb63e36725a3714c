"""Both sides in turn, then this system alone: tables, bench.json and a page:  python -m benchmarks --help"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ours, peer
from benchmarks.lines import LINES, Runs
from benchmarks.machine import machine
from benchmarks.page import write_bench_page
from benchmarks.times import PARTS, spread, spreads
from benchmarks.work import MODELS, Work
from othink_ray.driver.stopping import interrupted_status, interruptible

TWO_RANKS = "overlapped_2_ranks"
WAYS = {
    "plain": (),
    "overlapped": ("train.overlap=true", *ours.FAST_ENGINE),
    TWO_RANKS: ("train.overlap=true", *ours.FAST_ENGINE, "learner.world_size=2"),
}
PEER = "peer"


def main(arguments: Sequence[str]) -> int:
    parser = _parser()
    asked = parser.parse_args(arguments)
    folder = Path(asked.dir or f"runs/bench_{time.strftime('%Y-%m-%d_%H-%M-%S')}").absolute()
    works = [
        Work(prompts=asked.prompts, answers=asked.answers, tokens=asked.tokens, cells=one, model=asked.model)
        for one in asked.cells
    ]
    python = None if asked.no_peer or PEER not in asked.only else asked.peer.absolute()
    if python is not None and not python.exists():
        parser.error(f"--peer: there is no {python}; run launch/setup_peer.sh, or leave TRL out with --no-peer")
    found: dict[str, Any] = {"machine": machine(), "works": [], "lines": []}
    folder.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        (folder / "bench.json").write_text(json.dumps(found, indent=1))
        write_bench_page(folder, found)

    try:
        with interruptible():
            for work in works if PEER in asked.only else ():
                print(f"{work}: {asked.rounds} rounds of {asked.steps} steps", flush=True)
                found["works"].append(measure(work, asked.rounds, asked.steps, folder / str(work.image_tokens), python))
                keep()
                print(table(found["works"][-1]), flush=True)
            runs = Runs(folder, max(asked.steps, 5))
            for name in (name for name in LINES if name in asked.only):
                print(name, flush=True)
                for line in LINES[name](runs):
                    found["lines"].append(line.record())
                    print(line, flush=True)
                keep()
    except ours.BenchError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return interrupted_status()
    print(f"figures {folder / 'bench.json'}\npage    {folder / 'report.html'}")
    return 0


def ways_of(work: Work) -> dict[str, tuple[str, ...]]:
    """Two learner ranks only of the small model: of the pretrained one they do not fit 24 GiB."""
    return {way: overrides for way, overrides in WAYS.items() if work.model == "bench" or way != TWO_RANKS}


def measure(work: Work, rounds: int, steps: int, folder: Path, python: Path | None) -> dict[str, Any]:
    """Each side once a round, so that a slow spell of the machine meets all of them."""
    ways = ways_of(work)
    lines: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    theirs: list[float] = []
    for number in range(rounds):
        for way, overrides in ways.items():
            lines[way] += ours.train(work, steps, folder / f"{way}_{number}", overrides)
        if python is not None:
            theirs += peer.train(work, steps, folder / f"trl_{number}", python)
    sides: dict[str, Any] = {way: _figures(found, work) for way, found in lines.items()}
    if theirs:
        sides["trl"] = {"step_s": spread(theirs), "samples_per_s": work.samples / spread(theirs)["median"]}
        for way in ways:
            sides[way]["times_trl"] = sides[way]["samples_per_s"] / sides["trl"]["samples_per_s"]
    return {"name": str(work), "work": work.record(), "sides": sides}


def _figures(lines: Sequence[dict[str, Any]], work: Work) -> dict[str, Any]:
    times = spreads(lines)
    return {**times, "samples_per_s": work.samples / times["step_s"]["median"]}


def table(measured: dict[str, Any]) -> str:
    """A line a side: seconds a step, samples a second, how many times TRL's, and where the time goes."""
    rows = [f"  {'':<20}{'step s (min - max)':<24}{'samples/s':>10}{'x TRL':>7}   " + "  ".join(PARTS)]
    for side, found in measured["sides"].items():
        step = found["step_s"]
        times = f"{found['times_trl']:.2f}" if "times_trl" in found else ""
        parts = "  ".join(f"{found[f'{part}_s']['median']:.3f}" for part in PARTS if f"{part}_s" in found)
        shown = f"{step['median']:.3f} ({step['min']:.3f} - {step['max']:.3f})"
        rows.append(f"  {side:<20}{shown:<24}{found['samples_per_s']:>10.1f}{times:>7}   {parts}")
    return "\n".join(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cells", type=int, nargs="+", default=[4, 12, 24], help="images of so many cells squared")
    parser.add_argument("--model", choices=list(MODELS), default="bench", help="of the comparison with the peer")
    parser.add_argument("--prompts", type=int, default=8, help="P")
    parser.add_argument("--answers", type=int, default=8, help="G")
    parser.add_argument("--tokens", type=int, default=64, help="T, of each answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="that count, of each side in each round")
    parser.add_argument("--peer", type=Path, default=Path(".venv-peer/bin/python"), help="Python of the peer")
    every = [PEER, *LINES]
    parser.add_argument(
        "--only", nargs="+", choices=every, default=every, help="what to measure; all is most of an hour"
    )
    parser.add_argument("--no-peer", action="store_true", help="our side alone")
    parser.add_argument("--dir", help="folder for bench.json and all runs; else a new one in runs/")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

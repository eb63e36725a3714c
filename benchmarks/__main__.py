"""Compare with TRL, then check this system alone; writes tables, bench.json and a page:  python -m benchmarks --help"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ours, peer
from benchmarks.lines import CHECKS, Runs
from benchmarks.machine import machine
from benchmarks.page import write_bench_page
from benchmarks.times import PARTS, spread, spreads
from benchmarks.work import MODELS, Workload
from othink_ray.driver.stopping import interrupted_status, interruptible

TWO_RANKS = "overlapped_2_ranks"
VARIANTS = {
    "plain": (),
    "overlapped": ("train.overlap=true", *ours.FAST_ENGINE),
    TWO_RANKS: ("train.overlap=true", *ours.FAST_ENGINE, "learner.world_size=2"),
}
PEER = "peer"


def main(arguments: Sequence[str]) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    folder = Path(args.dir or f"runs/bench_{time.strftime('%Y-%m-%d_%H-%M-%S')}").absolute()
    works = [
        Workload(prompts=args.prompts, answers=args.answers, tokens=args.tokens, cells=cells, model=args.model)
        for cells in args.cells
    ]
    python = None if args.no_peer or PEER not in args.only else args.peer.absolute()
    if python is not None and not python.exists():
        parser.error(f"--peer: {python} does not exist; run launch/setup_peer.sh, or skip TRL with --no-peer")
    results: dict[str, Any] = {"machine": machine(), "works": [], "lines": []}
    folder.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        (folder / "bench.json").write_text(json.dumps(results, indent=1))
        write_bench_page(folder, results)

    try:
        with interruptible():
            for work in works if PEER in args.only else ():
                print(f"{work}: {args.rounds} rounds of {args.steps} steps", flush=True)
                results["works"].append(measure(work, args.rounds, args.steps, folder / str(work.image_tokens), python))
                save()
                print(table(results["works"][-1]), flush=True)
            runs = Runs(folder, max(args.steps, 5))
            for name in (name for name in CHECKS if name in args.only):
                print(name, flush=True)
                for check in CHECKS[name](runs):
                    results["lines"].append(check.record())
                    print(check, flush=True)
                save()
    except ours.BenchError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return interrupted_status()
    print(f"results {folder / 'bench.json'}\npage    {folder / 'report.html'}")
    return 0


def variants_of(work: Workload) -> dict[str, tuple[str, ...]]:
    """Return the variants to measure; two learner ranks of the pretrained model would not fit in 24 GiB."""
    return {name: overrides for name, overrides in VARIANTS.items() if work.model == "bench" or name != TWO_RANKS}


def measure(work: Workload, rounds: int, steps: int, folder: Path, python: Path | None) -> dict[str, Any]:
    """Run each side once per round, so that a slow phase of the machine affects all of them; return their summaries."""
    variants = variants_of(work)
    metrics: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    peer_seconds: list[float] = []
    for number in range(rounds):
        for name, overrides in variants.items():
            metrics[name] += ours.train(work, steps, folder / f"{name}_{number}", overrides)
        if python is not None:
            peer_seconds += peer.train(work, steps, folder / f"trl_{number}", python)
    sides: dict[str, Any] = {name: _summary(steps_logged, work) for name, steps_logged in metrics.items()}
    if peer_seconds:
        step_s = spread(peer_seconds)
        sides["trl"] = {"step_s": step_s, "samples_per_s": work.samples / step_s["median"]}
        for name in variants:
            sides[name]["times_trl"] = sides[name]["samples_per_s"] / sides["trl"]["samples_per_s"]
    return {"name": str(work), "work": work.record(), "sides": sides}


def _summary(metrics: Sequence[dict[str, Any]], work: Workload) -> dict[str, Any]:
    times = spreads(metrics)
    return {**times, "samples_per_s": work.samples / times["step_s"]["median"]}


def table(measured: dict[str, Any]) -> str:
    """Return a table with a row per side: seconds per step, throughput, speedup over TRL, seconds of each phase."""
    rows = [f"  {'':<20}{'step s (min - max)':<24}{'samples/s':>10}{'x TRL':>7}   " + "  ".join(PARTS)]
    for side, result in measured["sides"].items():
        step = result["step_s"]
        times = f"{result['times_trl']:.2f}" if "times_trl" in result else ""
        parts = "  ".join(f"{result[f'{part}_s']['median']:.3f}" for part in PARTS if f"{part}_s" in result)
        shown = f"{step['median']:.3f} ({step['min']:.3f} - {step['max']:.3f})"
        rows.append(f"  {side:<20}{shown:<24}{result['samples_per_s']:>10.1f}{times:>7}   {parts}")
    return "\n".join(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--cells", type=int, nargs="+", default=[4, 12, 24], help="image sizes: N means N*N image tokens"
    )
    parser.add_argument("--model", choices=list(MODELS), default="bench", help="model of the comparison with the peer")
    parser.add_argument("--prompts", type=int, default=8, help="P, prompts per step")
    parser.add_argument("--answers", type=int, default=8, help="G, answers per prompt")
    parser.add_argument("--tokens", type=int, default=64, help="T, tokens per answer")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side in each round")
    parser.add_argument("--peer", type=Path, default=Path(".venv-peer/bin/python"), help="Python interpreter with TRL")
    choices = [PEER, *CHECKS]
    parser.add_argument(
        "--only", nargs="+", choices=choices, default=choices, help="what to measure; everything takes about an hour"
    )
    parser.add_argument("--no-peer", action="store_true", help="measure this system only")
    parser.add_argument("--dir", help="folder for bench.json and all runs; else a new folder in runs/")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

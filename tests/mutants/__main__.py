"""Mutation tests: small changes of the code, each of which a test should detect:  python -m tests.mutants --help

All mutants of `core/`, `weights/` and the loops, a seeded sample of `engines/` and `runtime/`. A survivor is either a
missing assertion or an equivalent program; the latter are listed in explained.txt, each with its reason.

Neither maintained library fits: mutmut 3 and cosmic-ray do not delete statements, remove subscripts or drop terms of a
sum, the mutants that found blind tests here, and cosmic-ray starts an interpreter for each mutant, which would import
torch two thousand times.
"""

from __future__ import annotations

import argparse
import json
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.mutants.changes import Mutant, mutants
from tests.mutants.table import TABLE, Table
from tests.mutants.trials import Trials


def chosen(table: Table, only: Sequence[str], seed: int) -> list[Mutant]:
    """Return all mutants of the pure files, then the sample of the heavy ones; only those of `only`, if it names files.

    Whether a mutant is sampled depends on its own key: a change elsewhere in the code does not exchange the sample.
    """
    pure = [one for file in table.pure for one in mutants(file, table.source(file).read_text())]
    heavy = [one for file in table.heavy for one in mutants(file, table.source(file).read_text())]
    drawn = sorted(heavy, key=lambda one: sha256(f"{seed} {one.key}".encode()).digest())
    sample = sorted(drawn[: table.sample], key=lambda one: one.name)
    return [one for one in (*pure, *sample) if not only or any(one.file.startswith(name) for name in only)]


def digest(table: Table, file: str) -> str:
    """Return a digest of the source and its tests: a verdict holds as long as it stays equal."""
    texts = [table.source(file).read_bytes(), *((table.root / test).read_bytes() for test in table.covering(file))]
    return sha256(b"\0".join(texts)).hexdigest()[:16]


def explained(path: Path) -> dict[str, str]:
    """Return the reason why no test can detect a mutant, by the mutant's key."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    found: dict[str, str] = {}
    for line in lines:
        key, _, reason = line.rpartition(" | ")
        if key.count(" | ") < 3 or key in found:
            raise ValueError(f"{path.name}: once for each mutant, file | function | line | change | reason: {line}")
        found[key] = reason
    return found


class Run:
    """Mutants tried by several workers; verdicts are written as they come, and the next run reads them."""

    def __init__(self, table: Table, todo: Sequence[Mutant], results: Path, minutes: float) -> None:
        self._table = table
        self.verdicts: dict[str, dict[str, Any]] = {}
        self._digests = {file: digest(table, file) for file in {one.file for one in todo}}
        if results.exists():
            for line in results.read_text().splitlines():
                known = json.loads(line)
                if self._digests.get(known["file"]) == known["digest"]:
                    self.verdicts[known["name"]] = known
        self.todo = [one for one in todo if one.name not in self.verdicts]
        self._queue: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
        for one in self.todo:
            self._queue.put(one)
        results.parent.mkdir(parents=True, exist_ok=True)
        self._file = results.open("a")
        self._lock = threading.Lock()
        self._limits: dict[str, float] = {}
        self._began, self._until = time.monotonic(), time.monotonic() + 60 * minutes
        self.stopped = threading.Event()
        self.error: Exception | None = None
        self.done = 0

    def work(self) -> None:
        """Try mutants in one worker until none is left, time is up or the program is interrupted."""
        try:
            with Trials(self._table) as trials:
                while not self.stopped.is_set() and time.monotonic() < self._until:
                    try:
                        mutant = self._queue.get_nowait()
                    except queue.Empty:
                        return
                    limit = self._limit(mutant.file, trials)
                    began = time.monotonic()
                    status = trials.status(mutant.file, mutant, limit)
                    self._note(mutant, status, time.monotonic() - began)
        except Exception as error:
            self.error = error
            self.stopped.set()

    def _limit(self, file: str, trials: Trials) -> float:
        """Return the seconds after which a mutant counts as hung, from the tests' time on the unchanged code."""
        if file not in self._limits:
            began = time.monotonic()
            status = trials.status(file, None, 1800)
            if status != 0:
                said = trials.screen.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"tests of {file} fail without any mutant (status {status}):\n{said}")
            self._limits[file] = 10 + 3 * (time.monotonic() - began)
        return self._limits[file]

    def _note(self, mutant: Mutant, status: int | None, seconds: float) -> None:
        # 1: a test failed; 2: an import failed; others: the interpreter died. 5 (no tests) is excluded by _limit.
        verdict = "survived" if status == 0 else "hung" if status is None else "killed"
        record = {"name": mutant.name, "file": mutant.file, "digest": self._digests[mutant.file], "key": mutant.key}
        record |= {"verdict": verdict, "status": status, "seconds": round(seconds, 2)}
        with self._lock:
            self.verdicts[mutant.name] = record
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            self.done += 1
            each = (time.monotonic() - self._began) / self.done
            left = f"{(len(self.todo) - self.done) * each / 60:.0f} min left"
            if verdict == "survived" or self.done % 25 == 0:
                print(f"{self.done:>5} of {len(self.todo)}  {left:>13}  {verdict:<9} {mutant.name}", flush=True)


def report(selected: Sequence[Mutant], verdicts: dict[str, dict[str, Any]], reasons: dict[str, str]) -> int:
    """Print the survivors with line and change; return 1 if one is unexplained or some were not tried."""
    tried = [one for one in selected if one.name in verdicts]
    survivors = [one for one in tried if verdicts[one.name]["verdict"] == "survived"]
    new = [one for one in survivors if one.key not in reasons]
    for one in new:
        print(f"\n{one.name}  in {one.function or 'the module'}\n    {one.code}\n    {one.before}  ->  {one.after}")
    killed = {one.key for one in tried} - {one.key for one in survivors}
    for key in reasons.keys() & killed:
        print(f"\nexplained, but a test notices it: take it out of explained.txt\n    {key}")
    hung = sum(verdicts[one.name]["verdict"] == "hung" for one in tried)
    seconds = sum(verdicts[one.name]["seconds"] for one in tried)
    print(
        f"\n{len(selected)} mutants: {len(tried) - len(survivors)} killed ({hung} of them hung), "
        f"{len(survivors) - len(new)} explained, {len(new)} survived, {len(selected) - len(tried)} not tried; "
        f"{seconds / max(len(tried), 1):.1f} s each"
    )
    return int(bool(new) or len(tried) < len(selected))


def main(arguments: Sequence[str], table: Table = TABLE) -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="files or folders under othink_ray/, such as core/kl.py")
    parser.add_argument("--workers", type=int, default=2, help="number of mutants tried concurrently")
    parser.add_argument(
        "--budget-minutes", type=float, default=120, help="start no mutant later; the next run continues"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help=f"seed of the sample of {table.sample} mutants of engines/ and runtime/"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("runs/mutants.jsonl"), help="file of verdicts, which the next run reads"
    )
    options = parser.parse_args(arguments)
    todo = chosen(table, options.only, options.seed)
    if not todo:
        parser.error(f"--only {' '.join(options.only)}: no such file in tests/mutants/table.py")
    run = Run(table, todo, options.results, options.budget_minutes)
    print(f"{len(todo)} mutants, {len(todo) - len(run.todo)} of them decided before; {options.results}", flush=True)
    workers = [threading.Thread(target=run.work) for _ in range(options.workers)]
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as by Ctrl-C, without leftovers
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        print("ends with the mutants that are being tried", flush=True)
        run.stopped.set()
        for worker in workers:
            worker.join()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if run.error is not None:
        raise run.error
    return report(todo, run.verdicts, explained(table.explained))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

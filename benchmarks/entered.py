"""Counts the modules of the package whose code a training step enters, over all processes of a run.

    python -m benchmarks.entered [--checkout FOLDER] [a.b=value ...]

Runs a few steps of the default configuration with a hook in each process and prints the modules entered between
the ends of two steps. --checkout measures another checkout with the same environment, for a comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

_FIRST, _LAST = 3, 6  # the window: after step 3 is logged, until step 6 is
_BUCKETS = 20  # a second
# Python imports a module of this name at every start. It has each function of the package note its module at entry:
# profile hooks belong to threads, and Ray runs a learner's tasks on threads that Python did not start.
_HOOK = f"""
import ast, builtins, os, sys, time
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader

_path = os.path.join(os.environ["OTHINK_RAY_ENTERED"], f"{{os.getpid()}}.txt")
_file = os.open(_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
_seen = set()

def _note(name):
    entry = (name, int(time.time() * {_BUCKETS}))
    if entry not in _seen:
        _seen.add(entry)
        os.write(_file, f"{{entry[1]}} {{name}}\\n".encode())

class _Loader(SourceFileLoader):
    def path_stats(self, path):
        raise OSError  # no bytecode is read or written

    def source_to_code(self, data, path, *, _optimize=-1):
        tree = ast.parse(data)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0]
                note = ast.parse("_entered(__name__)").body[0]
                node.body.insert(int(ast.get_docstring(node) is not None), ast.copy_location(note, first))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

class _Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "othink_ray":
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and isinstance(spec.loader, SourceFileLoader):
                spec.loader = _Loader(spec.loader.name, spec.loader.path)
            return spec

builtins._entered = _note
sys.meta_path.insert(0, _Finder())
"""


def modules_entered(checkout: Path, settings: Sequence[str]) -> dict[str, int]:
    """Return module -> number of processes that entered it during the steps of the window."""
    with tempfile.TemporaryDirectory() as scratch:
        hook, notes, run_dir = (Path(scratch) / name for name in ("hook", "notes", "run"))
        hook.mkdir()
        notes.mkdir()
        (hook / "sitecustomize.py").write_text(_HOOK)
        subprocess.run(
            [
                *(sys.executable, "-m", "othink_ray.main", f"train.steps={_LAST + 2}", "eval.questions=16"),
                *(f"run.dir={run_dir}", *settings),
            ],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": f"{hook}:{checkout}", "OTHINK_RAY_ENTERED": str(notes)},
            stdout=sys.stderr,
            check=True,
        )
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        ends = {line["step"]: line["time/unix_s"] for line in lines}
        begin, end = (int(ends[step] * _BUCKETS) for step in (_FIRST, _LAST))
        processes = defaultdict(set)
        for note in notes.iterdir():
            for bucket, name in map(str.split, note.read_text().splitlines()):
                if begin < int(bucket) < end:
                    processes[name].add(note.stem)
    return {name: len(found) for name, found in sorted(processes.items())}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.entered")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("settings", nargs="*")
    chosen = parser.parse_args(arguments)
    entered = modules_entered(chosen.checkout.resolve(), chosen.settings)
    for name, count in entered.items():
        print(f"{name:<44}{count:>3} process{'es' if count > 1 else ''}")
    print(f"{len(entered)} modules")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Remove each guard from a copy of the tree and check that its test fails then:  python -m tests.drills.unguarded"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 300.0  # some guards prevent an endless wait


@dataclass(frozen=True, slots=True)
class Guard:
    """A guard: `code` in `file` under othink_ray/; with `without` instead, `test` under tests/ must fail."""

    name: str
    file: str
    code: str
    without: str
    test: str


GUARDS = (
    Guard(
        "without a compiler a run is slower, not stopped",
        "cpu/kernels.py",
        "    except RuntimeError as error:\n        warnings.warn(",
        "    except ZeroDivisionError as error:\n        warnings.warn(",
        "cpu/test_absent.py::test_without_a_compiler_attention_is_torchs_with_one_line",
    ),
    Guard(
        "a damaged checkpoint is not loaded",
        "driver/checkpoint.py",
        "    if changed:\n        raise DamagedError(",
        "    if False:\n        raise DamagedError(",
        "driver/test_checkpoint.py::test_auto_skips_a_damaged_checkpoint_and_a_path_refuses_it",
    ),
    Guard(
        "a checkpoint counts only when it is complete",
        "driver/checkpoint.py",
        "if path.suffix != _UNFINISHED",
        "if path",
        "driver/test_checkpoint.py::test_a_checkpoint_counts_only_when_it_is_finished",
    ),
    Guard(
        "a full disk costs a checkpoint, not the run",
        "driver/checkpoint.py",
        "        except OSError as error:\n            shutil.rmtree(partial",
        "        except ZeroDivisionError as error:\n            shutil.rmtree(partial",
        "drills/test_disk.py::test_a_checkpoint_without_room_leaves_the_last_whole_one",
    ),
    Guard(
        "a full disk leaves no record half written",
        "driver/metrics.py",
        "            self._file.truncate(self._size)\n",
        "",
        "drills/test_disk.py::test_records_wait_for_disk_space_and_none_is_torn_or_lost",
    ),
    Guard(
        "the best checkpoint is kept",
        "driver/checkpoint.py",
        "        if self.keep_best:",
        "        if False:",
        "driver/test_checkpoint.py::test_the_newest_checkpoints_and_the_best_one_are_kept",
    ),
    Guard(
        "a run resumes with its own seed only",
        "driver/checkpoint.py",
        "    if state.seed != seed:",
        "    if False:",
        "driver/test_checkpoint.py::test_resuming_with_another_seed_is_refused",
    ),
    Guard(
        "a run resumes its data where it stopped",
        "driver/async_loop.py",
        "        data_position = stream.position",
        "        data_position = 0",
        "driver/test_resume.py",
    ),
    Guard(
        "Adam resumes with its moments",
        "engines/learner_checkpoint.py",
        "            for kind in _MOMENTS if stored.steps else ():",
        "            for kind in ():",
        "engines/test_learner_state.py::test_a_checkpoint_resumes_on_other_ranks_and_stages",
    ),
    Guard(
        "a folder belongs to one run",
        "driver/run_dir.py",
        "            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "            pass",
        "driver/test_run_dir.py::test_a_second_run_is_refused_until_the_first_is_dead",
    ),
    Guard(
        "an engine that dies or hangs is replaced",
        "runtime/rollout_pool.py",
        "            if streams.lost:",
        "            if False:",
        "runtime/test_pools.py::test_a_lost_engine_is_replaced_and_its_prompts_resampled",
    ),
    Guard(
        "an engine that hangs is detected",
        "runtime/futures.py",
        "num_returns=1, timeout=self.timeout_s",
        "num_returns=1, timeout=None",
        "runtime/test_pools.py::test_a_lost_engine_is_replaced_and_its_prompts_resampled",
    ),
    Guard(
        "engines that hold other bits than sent stop the run",
        "runtime/weight_sync.py",
        '        require_arrived(self.rollout.wait_for(requested.checks, "checking weights"), self.version)\n',
        "",
        "runtime/test_push.py::test_a_stale_lm_head_is_caught",
    ),
    Guard(
        "engines that differ from the learner stop the run",
        "runtime/weight_sync.py",
        "self.tolerance.require(compare(probes, known, self.version))",
        "compare(probes, known, self.version)",
        "runtime/test_push.py::test_caches_kept_over_a_push_are_caught",
    ),
    Guard(
        "an engine with half a push does not answer",
        "engines/base.py",
        "        if self.version == _UNFINISHED:",
        "        if False:",
        "runtime/test_push.py::test_after_half_a_push_engines_refuse_until_a_whole_one",
    ),
    Guard(
        "restarts are limited and report the first cause",
        "runtime/monitoring.py",
        "        if self.restarts >= self.max_restarts:",
        "        if False:",
        "runtime/test_pools.py::test_after_its_restarts_a_run_stops_with_the_first_cause",
    ),
    Guard(
        "a grader that hangs is killed at its limit",
        "runtime/reward_pool.py",
        "ray.get(request.score, timeout=self.reward.timeout_s)",
        "ray.get(request.score)",
        "runtime/test_pools.py::test_only_answers_that_break_the_grader_are_masked",
    ),
    Guard(
        "an answer that cannot be graded is masked",
        "runtime/reward_pool.py",
        "valid = np.zeros(size), np.zeros(size, dtype=np.bool_)",
        "valid = np.zeros(size), np.ones(size, dtype=np.bool_)",
        "runtime/test_pools.py::test_only_answers_that_break_the_grader_are_masked",
    ),
    Guard(
        "the memory of a grader is limited",
        "runtime/reward_pool.py",
        "        _limit_memory(reward.actor_memory_mb)\n",
        "",
        "runtime/test_pools.py::test_only_answers_that_break_the_grader_are_masked",
    ),
    Guard(
        "the loss of a learner rank restarts all processes",
        "driver/training.py",
        "        except ProcessLost as error:",
        "        except ZeroDivisionError as error:",
        "e2e/test_faults.py::test_a_run_that_loses_processes_ends_like_an_intact_one",
    ),
    Guard(
        "the same command finds the latest checkpoint",
        "driver/checkpoint.py",
        'if resume == "auto" else ():',
        "if False else ():",
        "e2e/test_faults.py::test_a_run_whose_driver_is_killed_resumes_exactly",
    ),
    Guard(
        "SIGTERM finishes the step and saves",
        "driver/stopping.py",
        "            _request.since_s = now",
        "            interrupt(number, frame)",
        "e2e/test_interrupt.py::test_sigterm_finishes_and_saves_the_step",
    ),
    Guard(
        "a skipped update is counted",
        "engines/deepspeed_learner.py",
        "                skipped += 1",
        "                skipped += 0",
        "engines/test_learner.py::test_an_update_with_nan_loss_is_skipped_and_reported",
    ),
    Guard(
        "a KL that explodes is reported and stops the run",
        "driver/callbacks.py",
        "        if stats.kl_mean > faults.kl_limit:",
        "        if False:",
        "driver/test_guards.py::test_bad_steps_are_logged_and_patience_stops_the_run",
    ),
    Guard(
        "bad steps in a row stop the run",
        "driver/callbacks.py",
        "        if self.in_a_row >= self.faults.patience:",
        "        if False:",
        "driver/test_guards.py::test_bad_steps_are_logged_and_patience_stops_the_run",
    ),
    Guard(
        "an image of too many pixels is a bad row",
        "data/prompts.py",
        "    if width * height > MAX_IMAGE_PIXELS:",
        "    if False:",
        "data/test_bad_inputs.py::test_each_bad_input_gives_the_message_on_the_page",
    ),
    Guard(
        "both sides rotate an image by its EXIF data",
        "data/prompts.py",
        "        upright = ImageOps.exif_transpose(opened)",
        "        upright = opened.copy()",
        "data/test_pixels.py",
    ),
    Guard(
        "weights that could run code are refused",
        "driver/preflight.py",
        '            problems.append(Problem(subject="model.path"',
        '            str(Problem(subject="model.path"',
        "driver/test_preflight.py::test_weights_that_are_not_safetensors_are_refused",
    ),
    Guard(
        "a lack of room for checkpoints is found before",
        "driver/preflight.py",
        "    if needed > free:",
        "    if False:",
        "driver/test_preflight.py::test_a_disk_without_room_for_checkpoints_is_a_problem",
    ),
    Guard(
        "a run continues without a lost node",
        "driver/build.py",
        'config.faults.lost_node == "continue"',
        'config.faults.lost_node == "never"',
        "drills/test_two_hosts.py::test_a_run_survives_the_loss_of_a_host[continue]",
    ),
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drills.unguarded", description=__doc__)
    parser.add_argument("--only", default="", help="only guards whose name contains this")
    options = parser.parse_args(arguments)
    guards = [guard for guard in GUARDS if options.only in guard.name]
    blind = []
    for guard in guards:
        began = time.monotonic()
        error = without(guard)
        blind += [] if error else [guard.name]
        print(
            f"{guard.name:<54}{time.monotonic() - began:>6.0f} s  {error or 'ITS TEST PASSED WITHOUT IT'}", flush=True
        )
    print(f"{len(guards)} guards, {len(blind)} whose tests pass without them")
    return int(bool(blind))


def without(guard: Guard) -> str:
    """Return the test's error in a tree without the guard; empty if the test passes."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        for part in ("othink_ray", "tests", "conf", "docs", "launch"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "Makefile", "README.md"):
            shutil.copy(ROOT / name, tree / name)
        file = tree / "othink_ray" / guard.file
        code = file.read_text()
        assert code.count(guard.code) == 1, f"{guard.name}: {guard.file} does not hold its code once"
        file.write_text(code.replace(guard.code, guard.without))
        return _failure([sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", f"tests/{guard.test}"], tree)


def _failure(command: Sequence[str], tree: Path) -> str:
    with (tree / "screen.txt").open("w+") as screen:
        process = subprocess.Popen(
            list(command),
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
            stdout=screen,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(60)
            return f"no end within {_LIMIT_S:.0f} s"
        screen.seek(0)
        output = screen.read()
    assert code in (0, 1), output[-2000:]
    errors = [line.removeprefix("E").strip() for line in output.splitlines() if line.startswith("E  ")]
    return (errors or ["failed"])[0][:100] if code else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

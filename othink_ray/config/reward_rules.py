"""Rules on rewards: time enough for a group, and a reward of the user's own that is where its setting says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from othink_ray.config.problem import Problem, broken
from othink_ray.config.schema import Config

_TAKEN = ("accuracy", "format")


def _grading(config: Config) -> Iterator[Problem]:
    reward, answers = config.algo.reward, config.algo.group_size
    least = 2 * answers * reward.answer_cpu_s
    if 0 < reward.timeout_s < least:
        rule = (
            f"must be at least 2 x algo.group_size x algo.reward.answer_cpu_s = {least:g}: a group in which every "
            "answer outstays its time, and restarts the grading process, must end before its actor is killed"
        )
        yield broken(config, "algo.reward.timeout_s", rule, f"Set algo.reward.timeout_s={least:g}.")


def _own(config: Config) -> Iterator[Problem]:
    """It is read, not run: that happens where it can be killed."""
    own, key = config.algo.reward.own, "algo.reward.own"
    if own is None:
        return
    file, _, name = own.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        rule = "must be FILE.py:FUNCTION, and there is no such file here"
        yield broken(config, key, rule, "Set algo.reward.own=my_rewards.py:brevity, for example.")
        return
    try:
        functions = {
            one.name: one.args
            for one in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(one, ast.FunctionDef)
        }
    except (SyntaxError, UnicodeDecodeError) as error:
        yield broken(config, key, f"must be Python: {error}", f"Mend {file}.")
        return
    if name not in functions:
        near = get_close_matches(name, functions, n=1)
        hint = f"Did you mean {file}:{near[0]}? " if near else ""
        yield broken(
            config, key, f"{file} defines no function {name}", f"{hint}It has: {', '.join(functions) or 'none'}."
        )
    elif name in _TAKEN:
        rule = f"{name} is the name of a reward that is there already"
        yield broken(config, key, rule, "Give the function another name.")
    elif len(functions[name].args) - len(functions[name].defaults) != 2:
        rule = f"{name} must take two arguments: a completion's text and the true answer"
        yield broken(config, key, rule, f"Write def {name}(text: str, answer: str) -> float.")


REWARD_RULES = (_grading, _own)

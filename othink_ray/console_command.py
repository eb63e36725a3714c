"""Console command:  othink-ray MODE [group=name] [a.b=value] ...  is  python -m othink_ray.main mode=MODE ...

`othink-ray completion SHELL` prints a completion script; the script calls `othink-ray completion words WORD ...`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any

from othink_ray.config.bounds import MODES
from othink_ray.config.errors import ConfigError, Problem
from othink_ray.config.keys import keys, section_of, types_of
from othink_ray.config.load import COMMAND_LINE, conf_dir, groups
from othink_ray.config.schema import Config
from othink_ray.main import exit_on_signals

FLAGS = ("--help", "--version", "--cfg", "--info", "--multirun", "--hydra-help")


def start() -> int:
    """Run the command line of this process: answer it here, or replace the process by `python -m othink_ray.main`.

    The replacement keeps the process id, so signals, Ray jobs and Slurm see the same process either way.
    """
    exit_on_signals()
    words = sys.argv[1:]
    if words == ["--version"]:
        print(f"othink_ray {version('othink_ray')}")
        return 0
    if words and words[0] in SUBCOMMANDS:
        return SUBCOMMANDS[words[0]](words[1:])
    try:
        arguments = translated(words)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "othink_ray.main", *arguments])


def translated(words: Sequence[str]) -> list[str]:
    """Return the arguments of `python -m othink_ray.main`; raise ConfigError for an unknown or a second mode."""
    if not words:
        return ["--help"]
    mode = words[0]
    if not re.fullmatch(r"\w+", mode):
        return list(words)  # an override or a flag of Hydra
    if mode not in MODES:
        raise ConfigError([_unknown_mode(mode)])
    if second := next((word for word in words[1:] if word.startswith("mode=")), None):
        remedy = f"Remove {second} or {mode}."
        raise ConfigError([Problem(subject=f"{second} ({COMMAND_LINE})", rule="is a second mode", remedy=remedy)])
    return [f"mode={mode}", *words[1:]]


def _unknown_mode(name: str) -> Problem:
    known = (*MODES, *SUBCOMMANDS)
    near = get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    remedy = f"{hint}Use one of {', '.join(known)}."
    return Problem(subject=f"{name} ({COMMAND_LINE})", rule="unknown mode", remedy=remedy)


# ---- completion


def completion(words: Sequence[str]) -> int:
    """Print the completion script of a shell, or one candidate per line for `words` and the words typed so far."""
    if words[:1] == ["words"]:
        for word in candidates(words[1:]):
            print(word)
        return 0
    if len(words) != 1 or words[0] not in SCRIPTS:
        *others, last = SCRIPTS
        shells = f"{', '.join(others)} or {last}"
        fault = f"unknown shell {' '.join(words)}; use {shells}" if words else f"name a shell: {shells}"
        print(f"othink-ray completion: {fault}", file=sys.stderr)
        return 2
    print(SCRIPTS[words[0]], end="")
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    """Return what the last of `words` can become: a mode first, then groups, keys (one level at a time) and values."""
    *before, typed = words or [""]
    options = groups(conf_dir())
    if before == ["completion"]:
        found = list(SCRIPTS)
    elif typed.startswith("-"):
        found = list(FLAGS)
    elif "=" in typed:
        key = typed.partition("=")[0]
        found = [f"{key}={value}" for value in options.get(key) or _values(key)]
    elif not before:
        found = [*MODES, *SUBCOMMANDS]
    else:
        path = typed.rpartition(".")[0]
        found = _keys_below(path) if path else [*(f"{group}=" for group in options), *_keys_below("")]
        found = [word for word in found if word != "mode="]
    return [word for word in found if word.startswith(typed)]


def _kinds(path: str) -> Mapping[str, Any]:
    """Return name -> type of the keys of a section; empty if there is no such section."""
    section: Any = Config
    for part in filter(None, path.split(".")):
        section = None if section is None else section_of(types_of(section).get(part))
    return {} if section is None else types_of(section)


def _keys_below(path: str) -> list[str]:
    """Return the keys of a section: `train.steps=` for a value, `algo.kl.` for a section."""
    start = f"{path}." if path else ""
    return [f"{start}{name}{'=' if section_of(kind) is None else '.'}" for name, kind in _kinds(path).items()]


def _values(name: str) -> tuple[str, ...]:
    key = next((key for key in keys(Config) if key.name == name), None)
    if key is None or key.bound is None:
        return ("true", "false") if key is not None and key.kind is bool else ()
    return key.bound.choices


# Candidates end in = or . where the word goes on, so no shell adds a space after these; paths complete as usual.
SCRIPTS = {
    "bash": """\
_othink_ray() {
    local words word found
    read -ra words <<<"${COMP_LINE:0:COMP_POINT} |"
    word=${COMP_LINE:0:COMP_POINT}
    [[ $word == *" " ]] && words[-1]="" || unset "words[-1]"
    word=${words[-1]}
    mapfile -t COMPREPLY < <("$1" completion words "${words[@]:1}" 2>/dev/null)
    [[ ${COMPREPLY[*]} == *[=.] ]] && compopt -o nospace
    # Bash replaces only what follows the last = of the word.
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
    return 0
}
complete -o default -F _othink_ray othink-ray
""",
    "zsh": """\
#compdef othink-ray
_othink_ray() {
    local -a found more
    found=("${(@f)$("${words[1]}" completion words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    more=(${(M)found:#*[=.]})
    found=(${found:#*[=.]})
    (( $#more )) && compadd -S '' -- $more
    (( $#found )) && compadd -- $found
    (( $#more + $#found )) || { compset -P '*='; _files; }
}
compdef _othink_ray othink-ray
""",
    "fish": """\
function __othink_ray
    set -l words (commandline -opc) (commandline -ct)
    $words[1] completion words $words[2..-1] 2>/dev/null
end
complete -c othink-ray -f -a '(__othink_ray)'
""",
}
SUBCOMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"completion": completion}

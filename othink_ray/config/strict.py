"""Strict conversion of a composed tree to the dataclasses of the schema: no value is guessed, coerced or dropped.

Written by hand: pydantic's strict mode refuses `1e-6` (a string in YAML) and lists, accepts NaN, and knows neither the
file that set a key nor the key that was meant, so each of its messages would have to be rewritten here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, get_args, get_origin

from othink_ray.config import paths
from othink_ray.config.errors import Problem, as_yaml
from othink_ray.config.keys import default_tree, keys, section_of, sections, types_of, unwrap
from othink_ray.config.retired import retirement
from othink_ray.config.schema import Config, PartConfig

if TYPE_CHECKING:  # imported where it is used, so that importing this module stays fast
    from omegaconf import DictConfig

Origin = Callable[[str], str]  # dotted key -> where it was set


def convert(node: DictConfig, origin: Origin) -> tuple[Config | None, list[Problem]]:
    """Return the configuration with resolved paths, or None and every problem of the tree."""
    problems = list(_problems_of_section(node, Config, "", origin))
    if problems:
        return None, problems
    config: Config = _build(node, Config)
    resume = config.run.resume
    run = dataclasses.replace(
        config.run,
        dir=paths.output_path(config.run.dir),
        cache_dir=paths.output_path(config.run.cache_dir),
        resume=resume if resume in ("auto", "never") else paths.input_path(resume),
    )
    path = config.model.path
    model = dataclasses.replace(config.model, path=None if path is None else paths.input_path(path))
    data = dataclasses.replace(config.data, train=_resolved(config.data.train), test=_resolved(config.data.test))
    evaluation = dataclasses.replace(config.eval, models=tuple(map(paths.input_path, config.eval.models)))
    return dataclasses.replace(config, run=run, model=model, data=data, eval=evaluation), []


def problems_of_value(key: str, value: Any, origin: Origin) -> Iterable[Problem]:
    """Yield the problems of setting this dotted key to this value, before anything is composed."""
    kind: Any = Config
    parents: list[str] = []
    for part in key.split("."):
        section = section_of(kind)
        if section is None:
            parent = ".".join(parents)
            rule = f"{parent} is a single value and has no keys below it"
            yield Problem(subject=_subject(key, value, origin), rule=rule, remedy=f"Set {parent} itself.")
            return
        types = types_of(section)
        if part not in types:
            yield _unknown(key, value, origin, ".".join(parents), list(types))
            return
        parents.append(part)
        kind = types[part]
    if isinstance(value, str) and "${" in value:
        return  # an interpolation: `convert` checks its value after composing
    if section_of(kind) is not None and isinstance(value, dict):
        for name, below in value.items():
            yield from problems_of_value(f"{key}.{name}", below, origin)
    else:
        yield from _mismatch(key, value, kind, origin)


def _problems_of_section(node: DictConfig, section: Any, path: str, origin: Origin) -> Iterable[Problem]:
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    types = types_of(section)
    for name in map(str, node):
        key = f"{path}{name}"
        try:
            value: Any = node[name]
        except OmegaConfBaseException as error:
            rule = f"cannot be resolved: {str(error).splitlines()[0]}"
            remedy = "Fix the interpolation, or write the value itself."
            yield Problem(subject=f"{key} ({origin(key)})", rule=rule, remedy=remedy)
            continue
        plain = OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value
        if name not in types:
            yield _unknown(key, plain, origin, path.rstrip("."), list(types))
        elif section_of(types[name]) is not None and isinstance(value, DictConfig):
            yield from _problems_of_section(value, section_of(types[name]), f"{key}.", origin)
        else:
            yield from _mismatch(key, plain, types[name], origin)


def _build(node: Mapping[str, Any], section: Any) -> Any:
    """Return the dataclass of a section; a key that the tree does not have gets its default."""
    values: dict[str, Any] = {}
    defaults = default_tree(section)
    for name, kind in types_of(section).items():
        inner, _ = unwrap(kind)
        value = node[name] if name in node else defaults[name]
        if value is not None and dataclasses.is_dataclass(inner):
            value = _build(value, inner)
        elif value is not None and inner is float:
            value = float(value)
        elif get_origin(inner) is tuple:
            item = get_args(inner)[0]
            value = tuple(float(element) if item is float else element for element in value)
        values[name] = value
    return section(**values)


_EXPECTED = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}
_REMEDY = {
    int: "Write it in digits, such as 8.",
    float: "Write a number, such as 0.04 or 1e-6.",
    bool: "Write true or false.",
}


def _fits(value: Any, inner: Any) -> bool:
    if get_origin(inner) is tuple:
        return isinstance(value, list | tuple) and all(_fits(element, get_args(inner)[0]) for element in value)
    if inner is not bool and isinstance(value, bool):
        return False
    if inner is not float:
        return isinstance(value, inner)
    try:
        return isinstance(value, int | float | str) and math.isfinite(float(value))
    except ValueError:
        return False


def _mismatch(key: str, value: Any, kind: Any, origin: Origin) -> Iterable[Problem]:
    inner, optional = unwrap(kind)
    if value is None and optional:
        return
    if dataclasses.is_dataclass(inner):
        names = [field.name for field in dataclasses.fields(inner)]
        rule = "is a section, not a value"
        remedy = f"Set one of its keys instead ({', '.join(names)}), for example {key}.{names[0]}=…"
    elif value is not None and _fits(value, inner):
        return
    elif get_origin(inner) is tuple:
        rule = f"must be a list, each item {_EXPECTED[get_args(inner)[0]]}"
        example = "[0,0.5]" if get_args(inner)[0] is float else '[first,"2"]'
        remedy = f"Write it in brackets, for example '{key}={example}'."
    else:
        rule = f"must be {_EXPECTED[inner]}{' or null' if optional else ''}"
        if value is None:
            remedy = "Give it a value, or remove the override to use the default."
        elif inner is str:
            remedy = f'Quote it: \'{key}="{as_yaml(value)}"\' on the command line, "{as_yaml(value)}" in a file.'
        elif inner is int and isinstance(value, float) and value.is_integer():
            remedy = f"Write {int(value)}."
        else:
            remedy = _REMEDY[inner]
    yield Problem(subject=_subject(key, value, origin), rule=rule, remedy=remedy)


def _unknown(key: str, value: Any, origin: Origin, level: str, names: list[str]) -> Problem:
    subject = f"{key} ({origin(key)})" if isinstance(value, dict) else _subject(key, value, origin)
    retired = retirement(key, "…" if isinstance(value, dict) else as_yaml(value))
    if retired is not None:
        rule, remedy = retired
        return Problem(subject=subject, rule=rule, remedy=remedy)
    near = _closest(key)
    hint = f"Did you mean {near}? " if near else ""
    where = f"Keys of {level}" if level else "Top-level keys"
    return Problem(subject=subject, rule="unknown key", remedy=f"{hint}{where}: {', '.join(names)}.")


def _closest(key: str) -> str | None:
    """Return the known dotted key most similar to this one, as a whole or by its last part (`lr` -> `learner.lr`)."""

    def similarity(known: str) -> float:
        last = SequenceMatcher(None, key.rpartition(".")[2], known.rpartition(".")[2]).ratio()
        return max(SequenceMatcher(None, key, known).ratio(), 0.9 * last)

    best = max([*(known.name for known in keys(Config)), *(name for name, _ in sections(Config))], key=similarity)
    return best if similarity(best) >= 0.7 else None


def _subject(key: str, value: Any, origin: Origin) -> str:
    return f"{key} = {as_yaml(value)} ({origin(key)})"


def _resolved(part: PartConfig) -> PartConfig:
    if part.files is None:
        return part
    root = part.files.image_root
    files = dataclasses.replace(
        part.files, path=paths.input_path(part.files.path), image_root=None if root is None else paths.input_path(root)
    )
    return dataclasses.replace(part, files=files)

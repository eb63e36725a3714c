"""Load a Config from overrides: Hydra composes the defaults and conf/, and every problem is collected."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from othink_ray.config.errors import ConfigError as ConfigError
from othink_ray.config.errors import Problem as Problem
from othink_ray.config.keys import default_tree
from othink_ray.config.retired import RENAMED_OPTIONS
from othink_ray.config.schema import Config, DataConfig, SmolConfig
from othink_ray.config.strict import Origin, convert, problems_of_value

if TYPE_CHECKING:  # imported where it is used, so that `--help` and `import othink_ray.main` stay fast
    from hydra.conf import RuntimeConf
    from omegaconf import DictConfig

COMMAND_LINE, DEFAULT = "command line", "default"


def conf_dir() -> Path:
    """Return the folder of the shipped conf files: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "conf", package.parent / "conf")
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/config.yaml in {' or '.join(str(each.parent) for each in candidates)}: reinstall")


def register_defaults() -> None:
    """Register the defaults of the schema with Hydra; the defaults list of conf/config.yaml starts with them."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=default_tree(Config))
    store.store(group="section", name="smol", node=default_tree(SmolConfig))  # null by default: conf/model/smol.yaml


def groups(*folders: Path) -> dict[str, list[str]]:
    """Return the conf groups of these folders with their options, sorted by name."""
    found: dict[str, list[str]] = {}
    for file in sorted(file for folder in folders for file in folder.glob("*/*.yaml")):
        found.setdefault(file.parent.name, []).append(file.stem)
    return {group: sorted(set(options)) for group, options in sorted(found.items())}


def load(overrides: Sequence[str], folder: Path | None = None) -> Config:
    """Return the configuration that these overrides give, or raise ConfigError with every problem found."""
    config, problems = read(overrides, folder)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def data_named(name: str) -> DataConfig:
    """Return the data section of conf/data/NAME.yaml, without overrides."""
    return load([f"data={name}"]).data


def read(
    overrides: Sequence[str], folder: Path | None = None, more: Path | None = None
) -> tuple[Config | None, list[Problem]]:
    """Return the configuration (or None) and its problems; bad overrides are reported and left out.

    `folder`: the conf files, by default the shipped ones; `more`: a further folder, as with Hydra's --config-dir.
    """
    from omegaconf import open_dict, read_write

    folders = [folder or conf_dir(), *([more] if more else [])]
    options = groups(*folders)
    problems: list[Problem] = []
    kept: list[str] = []
    for text in overrides:
        found = _check_override(text, options)
        problems += found
        if not found:
            kept.append(text)
    composed, found = _compose(folders, kept)
    problems += found
    if composed is None:
        return None, problems
    origin = origins(composed.hydra.runtime, kept)
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    config, found = convert(composed, origin)
    return config, problems + found


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML, the content of a run's config.yaml."""
    from omegaconf import OmegaConf

    text: str = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
    return text


def origins(runtime: RuntimeConf, overrides: Sequence[str]) -> Origin:
    """Return a function that says where a key was set: the command line, the last conf file that has it, or default.

    `runtime`: Hydra's record of the folders it read, in the order it searches them, and of the chosen options.
    """
    folders, choices = [Path(each.path) for each in runtime.config_sources if each.schema == "file"], runtime.choices
    from_command_line = {text.lstrip("+").partition("=")[0] for text in overrides} - set(choices)

    @functools.cache  # the files are read only when a message needs them
    def files() -> list[tuple[str, dict[str, Any]]]:
        main = [folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()]
        found = [(f"{file.parent.name}/{file.name}", _yaml(file)) for file in main[:1]]
        for group, option in choices.items():
            found += _group_files(folders, group, option)
        return sorted(found, key=lambda named: len(named[1]) > 1)  # files with several sections are composed last

    def origin(key: str) -> str:
        parts = key.split(".")
        if not from_command_line.isdisjoint(".".join(parts[:size]) for size in range(1, len(parts) + 1)):
            return COMMAND_LINE
        return next((name for name, content in reversed(files()) if _has(content, parts)), DEFAULT)

    return origin


def unknown_option(subject: str, group: str, option: str, options: Sequence[str]) -> Problem:
    """Return the problem that a group has no such option, with the option that replaced it or that was meant."""
    new = RENAMED_OPTIONS.get((group, option))
    if new is not None:
        remedy = f"Write {new} for {option}; to resume an older run with the same samples, add {group}.name={option}."
        return Problem(subject=subject, rule=f"was renamed to {group}={new}", remedy=remedy)
    near = get_close_matches(option, options, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    rule = f"there is no {option} in the group {group}"
    return Problem(subject=subject, rule=rule, remedy=f"{hint}Options: {', '.join(options)}.")


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run of a sweep (`a.b=1,2`): all combinations, like Hydra's basic sweeper."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ValueType
    from hydra.errors import HydraException

    def alternatives(text: str) -> list[str]:
        try:
            parsed = OverridesParser.create().parse_override(text)
        except HydraException:
            return [text]  # `read` reports what is wrong with it
        if not parsed.is_sweep_override():
            return [text]
        if parsed.value_type is ValueType.GLOB_CHOICE_SWEEP or not parsed.is_discrete_sweep():
            return []  # only Hydra can expand it; each run is still checked when it starts
        return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]

    return [list(job) for job in itertools.product(*filter(None, map(alternatives, overrides)))]


# ---- one override


def _check_override(text: str, options: Mapping[str, list[str]]) -> list[Problem]:
    """Return the problems of one override, before anything is composed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    subject = f"{text} ({COMMAND_LINE})"
    if text.startswith("-"):
        remedy = f"Write settings without dashes: {text.lstrip('-')}; --help lists the common keys."
        return [Problem(subject=subject, rule="unknown flag", remedy=remedy)]
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        override = None
    key = "" if override is None else override.key_or_group
    if override is None or not key:
        name, equals, given = text.partition("=")
        quoted = f"'{name}=\"{given}\"'" if equals and name else "'run.dir=\"~/runs/first\"'"
        remedy = f"Write group=name or a.b=value; quote a value that contains any of = , ~ < > ( ) [ ] {{ }}: {quoted}"
        return [Problem(subject=subject, rule="is not of the form group=name or a.b=value", remedy=remedy)]
    if key.partition(".")[0].partition("/")[0] == "hydra":
        return []
    if override.is_delete():
        remedy = "Remove this override; to unset an optional key, set it to null."
        return [Problem(subject=subject, rule="deletes a key, but every key needs a value", remedy=remedy)]
    if override.is_sweep_override():
        remedy = "Add -m to run a sweep, or give one value (quote a string that contains a comma)."
        return [Problem(subject=subject, rule="gives several values to one run", remedy=remedy)]
    value: Any = override.value()
    if key in options and not isinstance(value, dict):
        return _check_option(subject, key, str(value), options[key])
    problems = list(problems_of_value(key, value, lambda _: COMMAND_LINE))
    if override.is_add() and not problems:
        remedy = f"Write it without the plus: {text.lstrip('+')}"
        problems.append(Problem(subject=subject, rule="adds a key that already exists", remedy=remedy))
    return problems


def _check_option(subject: str, group: str, option: str, options: list[str]) -> list[Problem]:
    return [] if option in options else [unknown_option(subject, group, option, options)]


# ---- composing


def _compose(folders: Sequence[Path], overrides: Sequence[str]) -> tuple[DictConfig | None, list[Problem]]:
    """Return the tree that Hydra composes (None if it cannot), and a problem for each override that it rejects."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    folder, *others = folders  # at most one other
    search = [f"hydra.searchpath=['file://{each.resolve()}']" for each in others]
    register_defaults()

    def attempt(chosen: Sequence[str]) -> DictConfig | str:
        try:
            with initialize_config_dir(version_base="1.3", config_dir=str(folder.resolve())):
                return compose("config", overrides=[*search, *chosen], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            return str(error).strip() or type(error).__name__

    tree = attempt(overrides)
    if not isinstance(tree, str):
        return tree, []
    base = attempt([])
    if isinstance(base, str):
        remedy = "Fix the file named above."
        return None, [Problem(subject=f"{folder.name}/config.yaml", rule=f"cannot be composed: {base}", remedy=remedy)]
    problems: list[Problem] = []
    kept: list[str] = []
    remedy = "Remove it, or choose a group option that has this key."
    for text in overrides:
        # Hydra applies group choices first, whatever their position: try each override with all accepted before it.
        tree = attempt([*kept, text])
        if isinstance(tree, str):
            rule = f"rejected by Hydra: {tree.splitlines()[0]}"
            problems.append(Problem(subject=f"{text} ({COMMAND_LINE})", rule=rule, remedy=remedy))
        else:
            kept.append(text)
            base = tree
    return base, problems


def _yaml(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(OmegaConf.load(file))
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _group_files(folders: Sequence[Path], group: str, option: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the files of a group option as (name, content): the files in its defaults list first, then its own."""
    found = [folder for folder in folders if (folder / group / f"{option}.yaml").is_file()]
    if not found:
        return  # hydra's own groups
    file = found[0] / group / f"{option}.yaml"
    content = _yaml(file)
    for base in content.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            yield from _group_files(folders, group, base)
    is_global = "@package _global_" in file.read_text(encoding="utf-8")
    yield f"{found[0].name}/{group}/{file.name}", content if is_global else {group: content}


def _has(content: Any, parts: Sequence[str]) -> bool:
    for part in parts:
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True

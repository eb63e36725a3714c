"""Problems of a configuration, printed as one short report."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from othink_ray.config.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem of a configuration: the key and its value, the rule it breaks, and the remedy."""

    subject: str
    rule: str
    remedy: str

    def __str__(self) -> str:
        lines = [self.subject]
        for text in (self.rule, self.remedy):
            lines += textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(lines)


class ConfigError(ValueError):
    """All problems of one configuration; its text is the whole report."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(dict.fromkeys(problems))
        count = len(self.problems)
        headline = f"{count} problem{'s' if count != 1 else ''} in the configuration:"
        super().__init__("\n\n".join([headline, *map(str, self.problems)]))


def value_of(config: Config, key: str) -> Any:
    """Return the value of a dotted key; None if a section above it is null."""
    value: Any = config
    for part in key.split("."):
        value = None if value is None else getattr(value, part)
    return value


def as_yaml(value: Any) -> str:
    """Return a value as YAML spells it, with '' for an empty string."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    return str(value) or "''"


def broken(config: Config, key: str, rule: str, remedy: str) -> Problem:
    """Return the problem that the value of `key` breaks `rule`."""
    value = value_of(config, key)
    shown = f"{value:g}" if isinstance(value, float) else as_yaml(value)
    return Problem(subject=f"{key} = {shown}", rule=rule, remedy=remedy)

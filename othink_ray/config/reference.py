"""Documentation of the keys from their declarations: the common keys, the keys of a section, and docs/config.md.

python -m othink_ray.config.reference > docs/config.md
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from othink_ray.config.errors import as_yaml
from othink_ray.config.keys import ConfigKey, keys, sections, unwrap
from othink_ray.config.load import conf_dir, groups
from othink_ray.config.schema import Config

_NAMES = {int: "integer", float: "number", bool: "true or false", str: "string"}
_PREFACE = """\
# Configuration keys

Generated from the declarations in `othink_ray/config/` by `python -m othink_ray.config.reference > docs/config.md`.

Set a key as `a.b=value` on the command line, or in a file of a group, which `group=option` selects. More files, such as
`FOLDER/algo/mine.yaml`, are added by `--config-dir FOLDER`. The defaults below hold unless a selected option sets the
key. `--cfg job` prints all values of a command; `--help algo.kl` prints one section of this page.
"""


def common_keys() -> str:
    """Return the common keys, each with its default and the first sentence of its comment."""
    common = [key for key in keys(Config) if key.common]
    shown = [f"{key.name}={_default(key)}" for key in common]
    width = max(map(len, shown)) + 2
    return "\n".join(
        textwrap.fill(
            _first_sentence(key.comment), 120, initial_indent=f"  {text:<{width}}", subsequent_indent=" " * (width + 2)
        )
        for text, key in zip(shown, common, strict=True)
    )


def described(name: str) -> str | None:
    """Return type, default, bound and comment of a key, or of every key of a section; None if there is no such key."""
    return (
        "\n".join(
            textwrap.fill(
                f"{key.name} = {_default(key)}  ({_kind(key)}{_bound(key, ', ')})", 118, subsequent_indent="    "
            )
            + "\n"
            + textwrap.fill(key.comment, 118, initial_indent="  ", subsequent_indent="  ")
            for key in keys(Config)
            if f"{key.name}.".startswith(f"{name}.")
        )
        or None
    )


def markdown() -> str:
    """Return docs/config.md: the options of each group, and a table of the keys of each section."""
    lines = [_PREFACE, "## Group options", "", "| option | |", "|---|---|"]
    for group, options in groups(conf_dir()).items():
        lines += [f"| `{group}={name}` | {_cell(_headline(conf_dir() / group / f'{name}.yaml'))} |" for name in options]
    by_section: dict[str, list[ConfigKey]] = {}
    for key in keys(Config):
        by_section.setdefault(key.name.rpartition(".")[0], []).append(key)
    docstrings = {"": Config.__doc__, **{name: section.__doc__ for name, section in sections(Config)}}
    for name, text in docstrings.items():
        if name in by_section:
            lines += ["", f"## {name or 'Top level'}", "", str(text), "", *_table(by_section[name])]
    return "\n".join(lines) + "\n"


def _table(listed: list[ConfigKey]) -> Iterator[str]:
    yield "| key | type | default | bound | |"
    yield "|---|---|---|---|---|"
    for key in listed:
        cells = (f"`{key.name}`", _kind(key), f"`{_default(key)}`", _bound(key), key.comment)
        yield f"| {' | '.join(map(_cell, cells))} |"


def _kind(key: ConfigKey) -> str:
    inner, optional = unwrap(key.kind)
    name = f"list of {_NAMES[get_args(inner)[0]]}s" if get_origin(inner) is tuple else _NAMES[inner]
    return f"{name} or null" if optional else name


def _default(key: ConfigKey) -> str:
    def shown(value: Any) -> str:
        return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else as_yaml(value)

    return f"[{','.join(map(shown, key.default))}]" if isinstance(key.default, tuple) else shown(key.default)


def _bound(key: ConfigKey, before: str = "") -> str:
    return f"{before}{key.bound.text}" if key.bound else ""


def _first_sentence(text: str) -> str:
    return re.split(r"\. (?=[A-Z])", text)[0]


def _cell(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if text.startswith("`") else text.replace("<", "&lt;")


def _headline(file: Path) -> str:
    """Return the first comment of a conf file, on one line."""
    text = file.read_text(encoding="utf-8").removeprefix("# @package _global_\n")
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")

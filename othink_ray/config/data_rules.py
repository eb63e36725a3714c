"""Rules between the settings of the data: where questions come from, and what that place needs."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from othink_ray.config.bounds import EASY_VQA_SUBSETS, GENERATED, SOURCES
from othink_ray.config.problem import Problem, broken, value_of
from othink_ray.config.schema import Config, FilesConfig

Split = Literal["train", "test"]
# Which keys of a files section a source reads; the others must be null, so that no setting is silently idle.
READS = {
    "hub": ("subset", "split", "stream_buffer"),
    "parquet": ("stream_buffer",),
    "jsonl": (),
    "disk": ("split",),
    "easy_vqa": ("subset", "split"),
}
FETCHED = ("hub", "easy_vqa")  # sources whose files come from elsewhere when they are read
ONLY_SOME_READ = ("subset", "split", "stream_buffer")


def data_rules(config: Config) -> Iterator[Problem]:
    """What is wrong with the sources of the two parts, and with what they are asked for."""
    for split in parts_asked(config):
        yield from _part(config, split)
    scenes, size = config.data.scenes, config.data.test.size
    asked_here = config.data.test.source in GENERATED and config.mode != "study"  # a study asks in its runs
    if asked_here and size is not None and (config.eval.questions or 0) > size:
        rule = f"must be at most data.test.size = {size}: there are no more held-out questions"
        yield broken(config, "eval.questions", rule, "Lower eval.questions or raise data.test.size.")
    if scenes is not None and scenes.max_items > scenes.image_cells**2:
        cells = scenes.image_cells
        rule = f"must be at most {cells**2}: an image of {cells} x {cells} cells holds one item a cell"
        remedy = "Raise data.scenes.image_cells or lower data.scenes.max_items."
        yield broken(config, "data.scenes.max_items", rule, remedy)
    if config.data.test.files is not None and config.data.test.files.stream_buffer is not None:
        rule = "must be null: held-out questions are always the same, the first ones"
        yield broken(config, "data.test.files.stream_buffer", rule, "Set data.test.files.stream_buffer=null.")


def test_rules(config: Config) -> Iterator[Problem]:
    """What is wrong with a data set that is only asked, never trained on."""
    yield from _part(config, "test")
    files = config.data.test.files
    if files is not None and not files.path:
        rule = "is empty: a data set of files is asked along where its conf file says where they are"
        yield broken(config, "data.test.files.path", rule, f"Write it in conf/data/{config.data.name}.yaml.")


def _part(config: Config, split: Split) -> Iterator[Problem]:
    part = config.data.part(split)
    if part.source in GENERATED:
        yield from _generated(config, f"data.{split}")
    elif part.source in SOURCES:
        yield from _files(config, f"data.{split}", part.source, part.files)


def parts_asked(config: Config) -> tuple[Split, ...]:
    """An evaluation needs no training questions, unless it has to teach the embedded model first."""
    ready = config.model.path is not None or config.eval.models
    return ("test",) if config.mode == "eval" and ready else ("train", "test")


def _generated(config: Config, part: str) -> Iterator[Problem]:
    source = value_of(config, f"{part}.source")
    if value_of(config, f"{part}.files") is not None:
        rule = f"reads no files, but {part}.files is set"
        yield broken(config, f"{part}.source", rule, f"Set {part}.files=null, or choose a source of files.")
    if value_of(config, f"{part}.size") is None:
        rule = f"must be a number: the source {source} makes as many questions as it is asked for"
        yield broken(config, f"{part}.size", rule, f"Set {part}.size=256, for example.")
    if source in ("scenes", "both_scenes") and config.data.scenes is None:
        rule = "needs the section data.scenes, which is null"
        yield broken(config, f"{part}.source", rule, "Use data=counting as the start.")


def _files(config: Config, part: str, source: str, files: FilesConfig | None) -> Iterator[Problem]:
    if files is None:
        rule = f"is null, but {part}.source = {source} reads files"
        yield broken(config, f"{part}.files", rule, "Use data=own as the start: it has the keys to fill in.")
        return
    for key in ONLY_SOME_READ:
        if getattr(files, key) is not None and key not in READS[source]:
            rule = f"must be null: the source {source} does not read it"
            yield broken(config, f"{part}.files.{key}", rule, f"Set {part}.files.{key}=null.")
    if source == "easy_vqa" and files.subset not in (None, *EASY_VQA_SUBSETS):
        rule = f"must be {', '.join(EASY_VQA_SUBSETS)} or null (all questions)"
        yield broken(config, f"{part}.files.subset", rule, f"Set {part}.files.subset=open.")
    if source == "hub" and files.split is None:
        rule = "must be a split of the data set on the hub"
        yield broken(config, f"{part}.files.split", rule, f"Set {part}.files.split=train, for example.")
    if source not in FETCHED and files.path and not _exists(source, files.path):
        kind = "a folder that save_to_disk wrote" if source == "disk" else "a file, a folder or a pattern of files"
        rule = f"must be {kind}; there is none here ({Path.cwd()})"
        yield broken(config, f"{part}.files.path", rule, f"Put it there, or set {part}.files.path.")
    if files.image_root and not Path(files.image_root).is_dir():
        rule = f"must be a folder: image paths start from it; there is none here ({Path.cwd()})"
        remedy = f"Set it to null where image paths start from the folder of {part}.files.path."
        yield broken(config, f"{part}.files.image_root", rule, remedy)


def _exists(source: str, path: str) -> bool:
    if source == "disk":
        return Path(path).is_dir()
    return Path(path).exists() or bool(glob.glob(path, recursive=True))

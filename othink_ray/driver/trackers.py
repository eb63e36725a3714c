"""Weights & Biases, off unless asked: a mirror of the run's records that may fail without harm to the run."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from omegaconf import OmegaConf
from PIL import Image

from othink_ray.atomic_write import atomic_write
from othink_ray.config.schema import WandbConfig

if TYPE_CHECKING:
    import wandb


QUESTIONS_OF_A_TABLE = 4
LAST_STEP = "wandb_last_step"
INIT_TIMEOUT_S = 60.0
FINISH_TIMEOUT_S = 60.0


class Tracker(Protocol):
    """Takes what the run's folder takes."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def sample(self, step: int, record: Mapping[str, Any]) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class NoTracker:
    """Tracking is off, or wandb could not start."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        return None

    def sample(self, step: int, record: Mapping[str, Any]) -> None:
        return None

    def close(self, *, failed: bool) -> None:
        return None


class WandbTracker:
    """One wandb run; the first failure is a warning, and nothing is sent after it.

    A step is sent once, as a whole, when the next one comes or the run ends. `last_step` is the file that keeps the
    newest step sent: a resumed run makes some steps again, and wandb has them already.
    """

    def __init__(self, run: wandb.Run, samples_every: int, last_step: Path) -> None:
        self._run = run
        self._samples_every = samples_every
        self._latest: deque[Mapping[str, Any]] = deque(maxlen=QUESTIONS_OF_A_TABLE)
        self._alive = True
        self._file = last_step
        # Online the server knows it too: its next step is 0 where it has none.
        self._sent = max(int(last_step.read_text()) if last_step.is_file() else -1, run.starting_step - 1)
        self._step, self._pending = -1, dict[str, Any]()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add(step, metrics)

    def sample(self, step: int, record: Mapping[str, Any]) -> None:
        """Every so many steps the latest questions become a table, their images in it."""
        if step > self._sent:
            self._latest.append(record)
        if (step + 1) % self._samples_every == 0:
            self._add_table(step)

    def close(self, *, failed: bool) -> None:
        self._add_table(self._step)
        self._send()
        self._try(lambda: self._run.finish(exit_code=1 if failed else 0))
        self._try(_wait_for_writer)

    def _add_table(self, step: int) -> None:
        if self._latest:
            self._try(lambda: self._add(step, {"samples": _table_of(self._latest)}))
            self._latest.clear()

    def _add(self, step: int, values: Mapping[str, Any]) -> None:
        if step != self._step:
            self._send()
            self._step = step
        if step > self._sent:
            self._pending |= values

    def _send(self) -> None:
        if self._pending:
            step, values, self._pending = self._step, self._pending, {}
            self._try(lambda: self._send_step(step, values))

    def _send_step(self, step: int, values: dict[str, Any]) -> None:
        atomic_write(self._file, f"{step}\n")  # first: a run that is killed in between must not send it again
        self._sent = step
        self._run.log(values, step=step, commit=True)

    def _try(self, action: Callable[[], None]) -> None:
        if not self._alive:
            return
        try:
            action()
        except Exception as error:  # whatever breaks in there, training goes on
            self._alive = False
            _warn(error)


def open_tracker(
    run_dir: Path, wandb: WandbConfig, config_yaml: str, environment: Mapping[str, Any], *, resumed: bool
) -> Tracker:
    """A tracker for `wandb.mode`; one that does nothing when it is off or wandb does not start."""
    if wandb.mode == "off":
        return NoTracker()
    try:
        settings = cast("dict[str, object]", OmegaConf.to_container(OmegaConf.create(config_yaml)))
        run = _start(run_dir, wandb, settings | {"environment": dict(environment)}, resumed)
        return WandbTracker(run, wandb.samples_every, run_dir / LAST_STEP)
    except Exception as error:  # whatever breaks in there, training goes on
        _warn(error)
        return NoTracker()


def _start(run_dir: Path, config: WandbConfig, settings: dict[str, object], resumed: bool) -> wandb.Run:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
    # Images of tables wait here for their upload; in the user's home, the default, an offline run would leave them.
    os.environ["WANDB_DATA_DIR"] = str((run_dir / "wandb" / "data").absolute())
    import wandb

    if config.mode == "online" and not wandb.login(prompt=False):
        raise ConnectionError(
            "wandb.mode is online but nobody is logged in: run `wandb login`, or use wandb.mode=offline"
        )
    name = run_dir / "wandb_id"
    known = name.read_text().strip() if resumed and name.is_file() else None
    run = wandb.init(
        id=known,
        resume="allow" if known else None,
        mode="online" if config.mode == "online" else "offline",
        dir=str(run_dir),
        project=config.project,
        config=settings,
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            # Machine facts are asked of a cloud metadata address: a needless request, and a slow one without a network.
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
        ),
    )
    if not known:
        (run_dir / LAST_STEP).unlink(missing_ok=True)  # of an older run in this folder
    atomic_write(name, run.id + "\n")
    return run


def _wait_for_writer() -> None:
    """finish() returns before wandb's own process has the last lines on disk; ending that process waits for them."""
    import wandb

    wandb.teardown()


def _table_of(samples: Iterable[Mapping[str, Any]]) -> wandb.Table:
    import wandb

    columns = ["step", "prompt_id", "image", "question", "truth", "completion", "reward", "advantage"]
    table = wandb.Table(columns=columns)
    for record in samples:
        images = [wandb.Image(_picture(uri)) for uri in record["images"][:1]]
        for completion in record["completions"]:
            table.add_data(
                *(record["step"], record["prompt_id"], images[0] if images else None),
                *(record["question"], record["answer"]),
                *(completion["text"], float(completion["reward"]), float(completion["advantage"])),
            )
    return table


def _picture(data_uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data_uri.partition(",")[2])))


def _warn(error: Exception) -> None:
    warnings.warn(
        f"wandb stopped ({type(error).__name__}: {error}); the run goes on, its records are in its own folder",
        RuntimeWarning,
        stacklevel=2,
    )

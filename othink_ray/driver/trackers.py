"""Weights & Biases, off by default: a copy of the run's records whose failure does not affect the run."""

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


QUESTIONS_PER_TABLE = 4
LAST_STEP = "wandb_last_step"
INIT_TIMEOUT_S = 60.0
FINISH_TIMEOUT_S = 60.0


class Tracker(Protocol):
    """Receives a copy of a run's records as they are written."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def sample(self, step: int, record: Mapping[str, Any]) -> None:
        """Receive a line of samples.jsonl."""
        ...

    def close(self, *, failed: bool) -> None: ...


class WandbTracker:
    """One wandb run that gets the records of the run's folder; after a first failure it warns and sends nothing more.

    A step is sent once, with all its values, when the next step begins or the run ends. The file `last_step` holds the
    newest step sent, because a resumed run repeats steps that wandb already has.
    """

    def __init__(self, run: wandb.Run, samples_every: int, last_step: Path) -> None:
        self._run = run
        self._samples_every = samples_every
        self._latest: deque[Mapping[str, Any]] = deque(maxlen=QUESTIONS_PER_TABLE)
        self._alive = True
        self._file = last_step
        # Online, the server knows the next step as well; it is 0 if there is none.
        self._sent = max(int(last_step.read_text()) if last_step.is_file() else -1, run.starting_step - 1)
        self._step, self._pending = -1, dict[str, Any]()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add(step, metrics)

    def sample(self, step: int, record: Mapping[str, Any]) -> None:
        """Keep the sample; every `samples_every` steps the latest ones become a table with images."""
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
        atomic_write(self._file, f"{step}\n")  # before sending: a run killed in between must not send the step twice
        self._sent = step
        self._run.log(values, step=step, commit=True)

    def _try(self, action: Callable[[], None]) -> None:
        if not self._alive:
            return
        try:
            action()
        except Exception as error:  # no failure of wandb may stop training
            self._alive = False
            _warn(error)


def open_tracker(
    run_dir: Path, wandb: WandbConfig, config_yaml: str, environment: Mapping[str, Any], *, resumed: bool
) -> Tracker | None:
    """Return the tracker for `wandb.mode`; None if it is off or wandb does not start."""
    if wandb.mode == "off":
        return None
    try:
        settings = cast("dict[str, object]", OmegaConf.to_container(OmegaConf.create(config_yaml)))
        run = _start(run_dir, wandb, settings | {"environment": dict(environment)}, resumed)
        return WandbTracker(run, wandb.samples_every, run_dir / LAST_STEP)
    except Exception as error:  # no failure of wandb may stop training
        _warn(error)
        return None


def _start(run_dir: Path, config: WandbConfig, settings: dict[str, object], resumed: bool) -> wandb.Run:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
    # Images of tables are staged here for upload; by default an offline run would leave them in the user's home.
    os.environ["WANDB_DATA_DIR"] = str((run_dir / "wandb" / "data").absolute())
    import wandb

    if config.mode == "online" and not wandb.login(prompt=False):
        raise ConnectionError(
            "wandb.mode = online, but wandb is not logged in: run `wandb login`, or set wandb.mode=offline"
        )
    id_file = run_dir / "wandb_id"
    run_id = id_file.read_text().strip() if resumed and id_file.is_file() else None
    run = wandb.init(
        id=run_id,
        resume="allow" if run_id else None,
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
            # Machine facts come from a cloud metadata address: an unnecessary request, and slow without a network.
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
        ),
    )
    if not run_id:
        (run_dir / LAST_STEP).unlink(missing_ok=True)  # left by an older run in this folder
    atomic_write(id_file, run.id + "\n")
    return run


def _wait_for_writer() -> None:
    """Stop wandb's service process: finish() returns before that process has written the last records."""
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
        f"wandb stopped ({type(error).__name__}: {error}); the run continues, with its records in the run folder",
        RuntimeWarning,
        stacklevel=2,
    )

"""The peer's side: TRL's GRPOTrainer in an environment of its own, at its best setting on a CPU."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from benchmarks.ours import model_folder, run
from benchmarks.times import WARM_UP
from benchmarks.work import BETA, RATE, Work
from othink_ray.config.load import read
from othink_ray.data import PromptStream, open_training
from othink_ray.runtime.placement import MALLOC

_SCRIPT = Path(__file__).with_name("peer_trl.py")
_QUESTIONS = 128
_ROWS = {"smol": 16}  # answers in one forward pass, at most: with all 64 its logits do not fit 24 GiB


def train(work: Work, steps: int, folder: Path, python: Path) -> list[float]:
    """Seconds of `steps` steps that count."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": str(model_folder(work)),
        "questions": str(_questions(work, folder)),
        "prompts": work.prompts,
        "answers": work.answers,
        "tokens": work.tokens,
        "rows": math.gcd(work.samples, _ROWS.get(work.model, work.samples)),
        "steps": steps + WARM_UP,
        "beta": BETA,
        "lr": RATE,
        "threads": os.cpu_count(),
        "output": str(folder),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(os.cpu_count())}
    command = [str(python), str(_SCRIPT), str(folder / "settings.json")]
    run(command, folder.with_suffix(".txt"), {**os.environ, **MALLOC, **quiet})
    seconds: list[float] = json.loads((folder / "steps.json").read_text())
    return seconds[WARM_UP:]


def _questions(work: Work, folder: Path) -> Path:
    """The run's own questions and images, as files that need none of our code."""
    config, _ = read(work.overrides())
    assert config is not None
    stream = PromptStream(open_training(config.data), seed=config.train.seed, on_bad_row="stop")
    rows = []
    for number, prompt in enumerate(stream.take(_QUESTIONS)):
        image = folder / f"{number}.png"
        image.write_bytes(prompt.images[0])
        text = " ".join(message.text for message in prompt.messages)
        rows.append({"image": str(image), "question": text, "answer": prompt.answer})
    path = folder / "questions.json"
    path.write_text(json.dumps(rows))
    return path

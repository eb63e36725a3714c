"""The peer: TRL's GRPOTrainer in a separate environment, with its fastest settings on a CPU."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from benchmarks.ours import model_folder, run
from benchmarks.times import WARM_UP
from benchmarks.work import BETA, RATE, Workload
from othink_ray.config.load import read
from othink_ray.data import PromptStream, open_training
from othink_ray.runtime.placement import MALLOC

_SCRIPT = Path(__file__).with_name("peer_trl.py")
_QUESTIONS = 128
_BATCH_SIZES = {"smol": 16}  # largest batch of a forward pass: the logits of all 64 answers exceed 24 GiB


def train(work: Workload, steps: int, folder: Path, python: Path) -> list[float]:
    """Return the seconds of `steps` steps, after the warm-up."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": str(model_folder(work)),
        "questions": str(_questions(work, folder)),
        "prompts": work.prompts,
        "answers": work.answers,
        "tokens": work.tokens,
        "rows": math.gcd(work.samples, _BATCH_SIZES.get(work.model, work.samples)),
        "steps": steps + WARM_UP,
        "beta": BETA,
        "lr": RATE,
        "threads": os.cpu_count(),
        "output": str(folder),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(os.cpu_count())}
    command = [str(python), str(_SCRIPT), str(folder / "settings.json")]
    run(command, folder.with_suffix(".txt"), {**os.environ, **MALLOC, **environment})
    seconds: list[float] = json.loads((folder / "steps.json").read_text())
    return seconds[WARM_UP:]


def _questions(work: Workload, folder: Path) -> Path:
    """Write the run's questions and images as files that the peer reads without this package; return their list."""
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

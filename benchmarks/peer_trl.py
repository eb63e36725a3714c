"""Train with TRL, in the peer's environment; writes steps.json, seconds per step:  python peer_trl.py settings.json"""

from __future__ import annotations

import json
import re
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any


def main(settings: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset, Image
    from transformers import AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(settings["threads"])
    rows = json.loads(Path(settings["questions"]).read_text())
    examples = [
        {"prompt": [{"role": "user", "content": row["question"]}], "image": row["image"], "answer": row["answer"]}
        for row in rows
    ]
    processor = AutoProcessor.from_pretrained(settings["model"])
    tokenizer = processor.tokenizer
    suppressed = sorted({*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<|image_pad|>")})
    samples = settings["prompts"] * settings["answers"]
    config = GRPOConfig(
        output_dir=settings["output"],
        per_device_train_batch_size=settings["rows"],
        gradient_accumulation_steps=samples // settings["rows"],
        num_generations=settings["answers"],
        max_completion_length=settings["tokens"],
        generation_kwargs={"suppress_tokens": suppressed},  # including EOS: every answer has full length
        beta=settings["beta"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        max_steps=settings["steps"],
        num_train_epochs=10**6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        torch_compile=True,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    step_ends: list[float] = []

    class StepTimer(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            step_ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step_ends.append(time.perf_counter())

    lengths: set[int] = set()

    def accuracy(completions: Any, answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Grade the last number of each answer, as this system does."""
        lengths.update(map(len, completion_ids))
        texts = [messages[0]["content"] for messages in completions]
        numbers = [re.findall(r"\d+", text) for text in texts]
        return [float(found[-1:] == [truth]) for found, truth in zip(numbers, answer, strict=True)]

    trainer = GRPOTrainer(
        model=settings["model"],
        reward_funcs=accuracy,
        args=config,
        train_dataset=Dataset.from_list(examples).cast_column("image", Image()),
        processing_class=processor,
        callbacks=[StepTimer()],
    )
    trainer.train()
    assert lengths == {settings["tokens"]}, f"answers have {lengths} tokens, expected {settings['tokens']}"
    seconds = [after - before for before, after in pairwise(step_ends)]
    (Path(settings["output"]) / "steps.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

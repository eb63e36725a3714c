"""A rollout that answers every prompt with its worked solution: the data source of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from othink_ray.data.prompts import worked_answer
from othink_ray.families.base import Family
from othink_ray.types import Completion, Group, Prompt


class Demonstrations:
    """Generator of groups with one worked answer each, tokenized as a sampled answer would be."""

    def __init__(self, family: Family, *, reasoning: bool = True) -> None:
        self.family, self.reasoning = family, reasoning

    def generate(self, prompts: Sequence[Prompt], version: int = 0) -> Iterator[Group]:
        for prompt in prompts:
            solution = worked_answer(prompt, reasoning=self.reasoning, answer_prefix=self.family.answer_prefix)
            answer = [*self.family.encode_text(solution), self.family.eos_token_id]
            counts = self.family.image_token_counts(prompt.images)
            yield Group(
                prompt=prompt,
                prompt_token_ids=np.array(
                    self.family.expand(self.family.prompt_token_ids(prompt), counts), dtype=np.int64
                ),
                completions=(
                    Completion(
                        token_ids=np.array(answer, dtype=np.int64),
                        sampler_logprobs=np.zeros(len(answer), dtype=np.float32),
                        text=self.family.answer_prefix + solution,
                        finish="stop",
                    ),
                ),
                version=version,
            )

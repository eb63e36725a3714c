"""Worked answers of prompts, tokenized: the data of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from othink_ray.data.prompts import worked_answer
from othink_ray.families.base import Family
from othink_ray.types import Completion, Group, Prompt


class Demonstrations:
    """Answers prompts with their worked solutions, tokenized as a sampled answer would be."""

    def __init__(self, family: Family, *, reasoning: bool = True) -> None:
        self.family, self.reasoning = family, reasoning

    def answer(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Return one group of one worked answer for each prompt."""
        return [self._group(prompt) for prompt in prompts]

    def _group(self, prompt: Prompt) -> Group:
        solution = worked_answer(prompt, reasoning=self.reasoning, answer_prefix=self.family.answer_prefix)
        answer = [*self.family.encode_text(solution), self.family.eos_token_id]
        counts = self.family.image_token_counts(prompt.images)
        completion = Completion(
            token_ids=np.array(answer, dtype=np.int64),
            sampler_logprobs=np.zeros(len(answer), dtype=np.float32),  # not sampled
            text=self.family.answer_prefix + solution,
            finish="stop",
        )
        prompt_ids = self.family.expand(self.family.prompt_token_ids(prompt), counts)
        return Group(
            prompt=prompt, prompt_token_ids=np.array(prompt_ids, dtype=np.int64), completions=(completion,), version=0
        )

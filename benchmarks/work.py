"""Workload of one training step, as overrides of a run.

W(P, G, T, I): P prompts x G answers of T tokens, I image tokens per prompt."""

from __future__ import annotations

from dataclasses import asdict, dataclass

CELL = 28  # pixels per side; one cell of an image is one image token
BETA = 0.04
RATE = 1e-5
MODELS = {
    "bench": ("model=bench",),
    "smol": ("model=smol", "model.tiny.warm_steps=0", "model.smol.warm_steps=0"),  # skill does not affect step times
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """P prompts x G answers of exactly T tokens, each prompt with an image of `cells` x `cells` tokens."""

    prompts: int
    answers: int
    tokens: int
    cells: int
    model: str = "bench"  # a key of MODELS

    @property
    def image_tokens(self) -> int:
        return self.cells**2

    @property
    def samples(self) -> int:
        return self.prompts * self.answers

    def __str__(self) -> str:
        return f"W({self.prompts}, {self.answers}, {self.tokens}, {self.image_tokens}) of model={self.model}"

    def record(self) -> dict[str, int | str]:
        return asdict(self) | {"image_tokens": self.image_tokens}

    def overrides(self) -> list[str]:
        """Return the overrides that give a run of mode=train this workload.

        The last number of an answer is graded even without tags, so that rewards of an untrained model differ.
        """
        return [
            *MODELS[self.model],
            f"model.max_pixels={max(self.image_tokens, 4) * CELL**2}",
            f"train.prompts_per_step={self.prompts}",
            *(f"algo.group_size={self.answers}", "algo=grpo", f"algo.kl.beta_min={BETA}"),
            *(f"rollout.max_tokens={self.tokens}", "rollout.fixed_length=true", "rollout.max_model_len=2048"),
            f"rollout.max_num_seqs={max(128, self.samples)}",
            f"data.scenes.max_items={min(6, self.image_tokens)}",
            *("data.prompt_suffix=''", f"data.scenes.image_cells={self.cells}", "algo.reward.without_tag=last_number"),
            *("eval.every=0", "eval.questions=1", "train.checkpoint_every=0"),  # the peer neither evaluates nor saves
            *(f"learner.lr={RATE}", "learner.warmup_frac=0"),
        ]

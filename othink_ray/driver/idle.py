"""What of the GPUs would stand still, read from the configuration alone."""

from __future__ import annotations

from othink_ray.config.schema import Config
from othink_ray.config.seat_rules import paired

_FULL = 0.25  # of rollout.max_num_seqs: with fewer sequences side by side a GPU reads all weights for few tokens


def idle(config: Config) -> list[str]:
    """A line for each waste, with the key to turn; nothing where no GPU takes part."""
    rollout, learner, train = config.rollout, config.learner, config.train
    if rollout.gpus_per_actor <= 0 or learner.gpus_per_rank <= 0:
        return []
    said = []
    engines, ranks = rollout.num_actors * rollout.gpus_per_actor, learner.world_size * learner.gpus_per_rank
    if not paired(learner, rollout) and not train.overlap:
        said.append(
            f"{engines:g} GPUs of engines wait while the learner works, and its {ranks:g} while they do: "
            "train.overlap=true lets both work at once"
        )
    side_by_side = train.prompts_per_step * config.algo.group_size / rollout.num_actors
    if side_by_side < _FULL * rollout.max_num_seqs:
        said.append(
            f"an engine samples {side_by_side:g} answers a step, and has room for {rollout.max_num_seqs} side by "
            "side (rollout.max_num_seqs): raise train.prompts_per_step, or lower rollout.num_actors"
        )
    if train.prompts_per_step < rollout.num_actors:
        said.append(
            f"{rollout.num_actors - train.prompts_per_step} engines get no prompt: train.prompts_per_step is "
            f"{train.prompts_per_step}, rollout.num_actors {rollout.num_actors}"
        )
    if learner.zero_stage == 3 and learner.world_size > _RANKS_OF_NODE:
        said.append(
            f"ZeRO-3 gathers the weights from {learner.world_size} ranks on several nodes in every pass: "
            "learner.zero_stage=2 keeps them on each, where they fit"
        )
    return said


_RANKS_OF_NODE = 8

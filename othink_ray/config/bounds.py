"""Rules on single keys, as two tables: the choices of named options, and the bounds of numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODES = ("train", "sft", "eval", "study", "check")
STUDY_SIZES = ("full", "small")
EXPERIMENTS = ("alpha", "beta", "same_task", "cross_task", "curves")
SCHEDULES = ("paper", "linear", "cosine", "exponential", "constant")
ADAPTIVE_SCHEDULES = ("target", "accuracy")
ADVANTAGES = ("group_std", "group_mean", "leave_one_out", "batch_std")
LOSSES = ("grpo", "gspo")
ATTENTIONS = ("auto", "dense", "grouped", "blocks", "fused", "flex")
LR_SCHEDULES = ("constant", "linear", "cosine")
LOSS_WEIGHTS = ("answer_mean", "token_mean", "constant_length")
CORRECTIONS = ("none", "token", "sequence", "icepop", "mis_token", "mis_sequence")
ESTIMATORS = ("k1", "k2", "k3")
HEAD_DIMS = (32, 64, 128)  # head sizes that vLLM's CPU attention supports
FROZEN: dict[str, tuple[str, ...]] = {"none": (), "vision": ("vision",), "projector": ("vision", "projector")}
LOST_NODE = ("wait", "continue")
WITHOUT_TAG = ("strict", "whole_text", "last_number")
OBJECT_STORE_MIN_MB = 80  # Ray rejects less than 75 MiB
GRADER_MIN_MB = 256  # the grading process itself takes 70 MiB

GENERATED = ("scenes", "geometry_scenes", "both_scenes")  # sources that generate their questions
SOURCES = (*GENERATED, "hub", "parquet", "jsonl", "disk", "easy_vqa")
EASY_VQA_SUBSETS = ("open", "shape", "colour", "yes_no")  # open: shapes and colors
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")

CHOICES: dict[str, tuple[str, ...]] = {
    "mode": MODES,
    "algo.advantage": ADVANTAGES,
    "algo.loss": LOSSES,
    "algo.loss_weights": LOSS_WEIGHTS,
    "learner.attention": ATTENTIONS,
    "algo.correction": ("auto", *CORRECTIONS),
    "algo.kl.schedule": SCHEDULES + ADAPTIVE_SCHEDULES,
    "algo.kl.estimator": ESTIMATORS,
    "algo.reward.without_tag": WITHOUT_TAG,
    "learner.lr_schedule": LR_SCHEDULES,
    "learner.freeze": tuple(FROZEN),
    "model.family": FAMILIES,
    "model.dtype": ("float32", "bfloat16"),
    "data.task": ("counting", "geometry", "vqa"),
    "data.train.source": SOURCES,
    "data.test.source": SOURCES,
    "data.on_bad_row": ("drop", "stop"),
    "rollout.engine": ("vllm", "hf"),
    "faults.lost_node": LOST_NODE,
    "weights.transport": ("auto", "shared_memory", "nccl", "ipc"),
    "cluster.placement": ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"),
    "study.size": STUDY_SIZES,
    "wandb.mode": ("off", "offline", "online"),
}
_FILES_STRINGS = (
    *("path", "subset", "split", "image_root"),
    *("columns.image", "columns.question", "columns.answer", "columns.id"),
)


@dataclass(frozen=True, slots=True)
class Bound:
    """A rule on the value of each of `keys`; `{key}` in the remedy is filled in."""

    rule: str
    holds: Callable[[Any], bool]
    remedy: str
    keys: tuple[str, ...]


def _keys(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BOUNDS = (
    Bound(
        "must be at least 2: the advantage compares an answer with the other answers of its group (Eq. 2)",
        lambda value: value >= 2,
        "Set {key}=8, the paper's value.",
        ("algo.group_size",),
    ),
    Bound(
        "must be at least 1",
        lambda value: value >= 1,
        "Set {key}=1 or more.",
        _keys(
            """
            train.steps train.prompts_per_step train.keep_last
            algo.updates_per_step algo.reward.actors algo.sampling_rounds
            model.min_pixels model.max_pixels model.tiny.text_width model.tiny.text_layers model.tiny.kv_heads
            model.tiny.vision_width model.tiny.vision_layers model.tiny.warm_batch model.tiny.warm_questions
            model.smol.warm_batch
            data.train.size data.test.size data.scenes.max_items data.scenes.image_cells
            data.train.files.stream_buffer data.test.files.stream_buffer
            rollout.num_actors rollout.tensor_parallel rollout.threads rollout.max_tokens rollout.max_num_seqs
            rollout.max_images rollout.kv_cache_gb
            learner.world_size learner.threads learner.logit_rows learner.micro_tokens
            weights.bucket_mb weights.audit_prompts weights.audit_tokens weights.audit_candidates
            eval.questions
            study.seeds study.sweep_seeds study.small_seeds study.parallel
            faults.patience
            wandb.samples_every
            """
        ),
    ),
    Bound(
        "must be at least 0",
        lambda value: value >= 0,
        "Set {key}=0 or more.",
        _keys(
            """
            train.seed train.checkpoint_every
            run.trace_steps
            faults.max_restarts
            eval.every eval.samples
            model.tiny.seed model.tiny.warm_steps model.smol.seed model.smol.warm_steps
            algo.kl.beta_min algo.kl.beta_max algo.reward.accuracy_weight algo.reward.format_weight
            learner.weight_decay learner.cpus_per_rank learner.lora.rank
            rollout.cpus_per_actor rollout.gpus_per_actor
            cluster.wait_s
            """
        ),
    ),
    Bound(
        "must be greater than 0",
        lambda value: value > 0,
        "Set {key} to a positive number.",
        _keys(
            """
            algo.clip_eps_high algo.kl.target algo.reward.timeout_s algo.reward.answer_cpu_s
            model.tiny.warm_lr model.smol.warm_lr model.smol.warm_projector_scale
            rollout.temperature rollout.load_timeout_s rollout.step_timeout_s
            learner.load_timeout_s learner.step_timeout_s learner.vision_lr_scale learner.projector_lr_scale
            learner.lr learner.adam_eps learner.max_grad_norm learner.lora.alpha
            weights.audit_tolerance
            faults.kl_limit faults.gap_limit
            cluster.gpu_memory_gb
            """
        ),
    ),
    Bound(
        "must be between 0 and 1, as a fraction of all steps (w / t)",
        lambda value: 0 <= value <= 1,
        "Set {key}=0.3, the paper's value.",
        ("algo.kl.explore_frac",),
    ),
    Bound(
        "must be at least 0 and less than 1, as a fraction of all steps",
        lambda value: 0 <= value < 1,
        "Set {key}=0.05.",
        ("learner.warmup_frac",),
    ),
    Bound(
        "must be greater than 0 and at most 1: the gain of the beta controller in one step",
        lambda value: 0 < value <= 1,
        "Set {key}=0.1.",
        ("algo.kl.adapt_rate",),
    ),
    Bound(
        "must be greater than 0 and less than 1: the ratio is clipped to 1 - eps .. 1 + eps (Eq. 4)",
        lambda value: 0 < value < 1,
        "Set {key}=0.2.",
        ("algo.clip_eps",),
    ),
    Bound(
        "must be at least 1: a ratio of 1 (policy equals sampler) must not be truncated",
        lambda value: value >= 1,
        "Set {key}=2.",
        ("algo.correction_cap",),
    ),
    Bound(
        "must be between 0 and 1: a ratio of 1 (policy equals sampler) must not be masked",
        lambda value: 0 <= value <= 1,
        "Set {key}=0.5.",
        ("algo.correction_low",),
    ),
    Bound(
        "must be at least 0 and less than 1",
        lambda value: 0 <= value < 1,
        "Set {key}=0.9.",
        ("learner.adam_beta1", "learner.adam_beta2"),
    ),
    Bound(
        "must be greater than 0 and at most 1, as a fraction of the GPU's memory",
        lambda value: 0 < value <= 1,
        "Set {key}=0.85, or 0.3 if the learner shares the GPU.",
        ("rollout.gpu_memory_utilization",),
    ),
    Bound(
        "must be a ZeRO stage: 1 (optimizer states), 2 (+ gradients) or 3 (+ parameters)",
        lambda value: value in (1, 2, 3),
        "Set {key}=2, or 3 if the parameters do not fit on one device.",
        ("learner.zero_stage",),
    ),
    Bound(
        "must be between 0 and 1: one rank uses one GPU",
        lambda value: 0 <= value <= 1,
        "Set {key}=1 and raise learner.world_size.",
        ("learner.gpus_per_rank",),
    ),
    Bound(
        f"must be one of {', '.join(map(str, HEAD_DIMS))}: vLLM's CPU attention supports no other head sizes",
        lambda value: value in HEAD_DIMS,
        "Set {key}=32.",
        ("model.tiny.head_dim",),
    ),
    Bound(
        f"must be at least {OBJECT_STORE_MIN_MB} (MiB): Ray rejects a smaller object store",
        lambda value: value >= OBJECT_STORE_MIN_MB,
        "Set {key}=256.",
        ("cluster.object_store_mb",),
    ),
    Bound(
        f"must be at least {GRADER_MIN_MB} (MiB): math-verify does not run in less",
        lambda value: value >= GRADER_MIN_MB,
        "Set {key}=1024.",
        ("algo.reward.memory_mb", "algo.reward.actor_memory_mb"),
    ),
    Bound(
        "must not be empty",
        lambda value: value != "",
        "Set {key} to a value, or remove it from the command.",
        (
            *("run.dir", "run.cache_dir", "run.resume", "wandb.project"),
            *(f"data.{split}.files.{key}" for split in ("train", "test") for key in _FILES_STRINGS),
        ),
    ),
)

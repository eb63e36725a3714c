"""Configuration keys of the system: the run's folder, engines, learner, weight push, faults, cluster and trackers."""

from __future__ import annotations

from dataclasses import dataclass, field

from othink_ray.config import bounds
from othink_ray.config.bounds import at_least, between, not_empty, one_of, positive
from othink_ray.config.keys import key


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Folders of a run, resuming and tracing."""

    dir: str = key(
        "runs/${now:%Y-%m-%d_%H-%M-%S}",
        "the run's folder: metrics, samples, report, checkpoints and export",
        not_empty(),
        common=True,
    )
    cache_dir: str = key("~/.cache/othink_ray", "warm-started base models, shared by runs", not_empty())
    resume: str = key(
        "never",
        "never, auto (from the newest checkpoint in run.dir) or a checkpoints/step_N folder",
        not_empty(),
        common=True,
    )
    trace_steps: int = key(
        10, "the first N steps are traced to trace.json, a timeline of all processes; 0: no trace", at_least(0)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """The rollout engines; the defaults are sized for vLLM on two cores with the tiny model."""

    engine: str = key(
        "vllm",
        "vllm, or hf: a decoding loop on plain transformers, for machines without vLLM",
        one_of("vllm", "hf"),
    )
    num_actors: int = key(1, "number of engines", at_least(1), common=True)
    cpus_per_actor: float = key(
        0.5, "CPUs that Ray reserves per engine; on CPU, rollout and learner use the same cores in turn", at_least(0)
    )
    gpus_per_actor: float = key(0.0, "GPUs per engine; below 1: the GPU is shared with a learner rank", at_least(0))
    tensor_parallel: int = key(1, "processes, one GPU each, that share the text model of one engine", at_least(1))
    sleep: bool = key(False, "with a shared GPU: the engine frees its memory while the learner works")
    threads: int | None = key(
        None,
        "OpenMP threads per engine; null: cores / engines (with train.overlap: cores / (engines + learner ranks))",
        at_least(1),
    )
    temperature: float = key(1.0, "temperature of sampled answers; greedy answers of evaluations ignore it", positive())
    max_tokens: int = key(32, "maximum tokens per answer", at_least(1), common=True)
    fixed_length: bool = key(False, "ignore end tokens, so that every answer has max_tokens tokens")
    max_model_len: int = key(256, "maximum tokens of prompt, images and answer together")
    max_num_seqs: int = key(128, "maximum number of answers that an engine generates at the same time", at_least(1))
    max_images: int = key(1, "maximum images per prompt", at_least(1))
    kv_cache_gb: int = key(1, "GiB of KV cache on CPU, an integer", at_least(1))
    gpu_memory_utilization: float = key(
        0.85,
        "fraction of the GPU's memory for vLLM; unused on CPU",
        between(
            0,
            1,
            unit="as a fraction of the GPU's memory",
            open_at="low",
            use="0.85, or 0.3 if the learner shares the GPU",
        ),
    )
    enforce_eager: bool = key(True, "no compilation or CUDA graphs: faster start, slower steps")
    prefix_caching: bool = key(True, "prefill a prompt once for all its answers; false: once per answer")
    balance: bool = key(True, "assign prompts to engines by previous answer lengths; false: round robin")
    load_timeout_s: float = key(300.0, "seconds to load a model", positive())
    step_timeout_s: float = key(600.0, "seconds without a result after which an engine counts as hung", positive())


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: W is frozen, and A and B in W + alpha / rank * B A are trained."""

    rank: int = key(0, "0: no adapters; typically 8 to 64, with a larger learner.lr", at_least(0), common=True)
    alpha: int = key(32, "the adapter's output is scaled by alpha / rank", positive())
    targets: tuple[str, ...] = key(
        ("text",),
        "text, vision, projector (all linear layers of that part), or layer names such as q_proj",
        common=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """The DeepSpeed learner: ranks, optimizer, trained parts and kernels; sized for the tiny model on two cores."""

    world_size: int = key(1, "number of ranks", at_least(1), common=True)
    zero_stage: int = key(
        1,
        "shards over ranks: 1 optimizer states, 2 + gradients (communicated in each micro-batch), 3 + parameters",
        bounds.ZERO_STAGE,
        common=True,
    )
    cpus_per_rank: float = key(
        0.5, "CPUs that Ray reserves per rank; on CPU, rollout and learner use the same cores in turn", at_least(0)
    )
    gpus_per_rank: float = key(
        0.0,
        "GPUs per rank; below 1: the GPU is shared with an engine",
        between(0, 1, "one rank uses one GPU", use="1 and raise learner.world_size"),
    )
    threads: int | None = key(
        None,
        "OpenMP threads per rank; null: cores / ranks (with train.overlap: cores / (ranks + engines))",
        at_least(1),
    )
    lr: float = key(1e-6, "peak learning rate; model=tiny and model=smol set higher ones", positive(), common=True)
    lr_schedule: str = key(
        "constant", "constant, linear (to 0 at the last step) or cosine (to 0)", one_of(*bounds.LR_SCHEDULES)
    )
    warmup_frac: float = key(
        0.05,
        "fraction of the steps in which the rate rises to lr: Adam's first steps are large and noisy",
        between(0, 1, unit="as a fraction of all steps", open_at="high", use="0.05"),
    )
    weight_decay: float = key(0.0, "decoupled weight decay (AdamW)", at_least(0))
    adam_beta1: float = key(0.9, "decay of Adam's first moment", between(0, 1, open_at="high", use="0.9"))
    adam_beta2: float = key(0.999, "decay of Adam's second moment", between(0, 1, open_at="high", use="0.9"))
    adam_eps: float = key(
        1e-8,
        "Adam's epsilon; keep it far below the gradients' RMS, 2e-5 with 2e9 parameters and gradient norm 1",
        positive(),
    )
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm", positive())
    vision_lr_scale: float = key(1.0, "vision tower learning rate as a multiple of lr", positive())
    projector_lr_scale: float = key(1.0, "projector learning rate as a multiple of lr", positive())
    freeze: str = key(
        "none",
        "none, vision (the tower; its projector is trained) or projector (tower and projector)",
        one_of(*bounds.FROZEN),
        common=True,
    )
    lora: LoraConfig = field(default_factory=LoraConfig)
    share_features: bool = key(
        True, "if tower and projector are frozen, encode an image once for policy, old policy and reference"
    )
    shared_prefix: bool = key(
        True, "one packed sample per group: prompt and images are computed once; false: one sample per answer"
    )
    onednn: bool = key(True, "on CPU: float32 matmul by oneDNN instead of torch's BLAS, up to twice as fast")
    prune_last_layer: bool = key(
        True, "on prompt tokens the last layer computes only keys and values, because nothing else is used"
    )
    compile: bool = key(
        False, "compile the layers: about 10 % faster on CPU, half a minute at the first start; needs g++"
    )
    attention: str = key(
        "auto",
        "fused (CPU kernel, needs g++), flex (GPU), grouped (per answer), blocks (long prompts) or dense. auto: flex "
        "on GPUs; on CPUs fused where its kernel is faster, else grouped or blocks by prompt length",
        one_of(*bounds.ATTENTIONS),
    )
    logit_rows: int = key(1024, "maximum rows of [rows, vocabulary] logits in memory at a time", at_least(1))
    micro_tokens: int = key(
        2560, "maximum tokens per forward pass of a rank; a longer packed sample gets its own pass", at_least(1)
    )
    gradient_checkpointing: bool = key(False, "less memory, one more forward pass")
    load_timeout_s: float = key(300.0, "seconds to load a model", positive())
    step_timeout_s: float = key(600.0, "seconds without a result after which a rank counts as hung", positive())


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """Weight push from learner to engines, and its audit."""

    transport: str = key(
        "auto",
        "auto: ipc on a shared GPU, nccl between GPUs, shared_memory without GPUs; LoRA adapters always use "
        "shared_memory",
        one_of("auto", "shared_memory", "nccl", "ipc"),
    )
    bucket_mb: int = key(64, "MiB per transfer; a larger weight gets a bucket of its size", at_least(1))
    audit_prompts: int = key(
        2, "prompts of the audit after each push; each is answered once, and the answer is a probe", at_least(1)
    )
    audit_tokens: int = key(2, "tokens of each probe's answer", at_least(1))
    audit_candidates: int = key(8, "likeliest tokens whose logprobs are compared at each index of a probe", at_least(1))
    audit_tolerance: float | None = key(
        None,
        "mean gap in nats above which the run stops; null: derived from dtype, depth and the gap of the first push",
        positive(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultsConfig:
    """Fault tolerance: limits after which a run stops."""

    max_restarts: int = key(
        5,
        "maximum number of dead or hung processes replaced per run; after these, the run stops with the first cause",
        at_least(0),
    )
    lost_node: str = key(
        "wait",
        "after losing a node: wait (until the cluster is large enough again) or continue (with the remaining nodes)",
        one_of("wait", "continue"),
    )
    patience: int = key(
        3,
        "the run stops after this many consecutive bad steps (update skipped for NaN, KL or gap above its limit)",
        at_least(1),
    )
    kl_limit: float = key(10.0, "KL above which a step is bad, nats per answer token", positive())
    gap_limit: float = key(
        1.0, "mean gap between sampler and learner above which a step is bad, nats per answer token", positive()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The Ray cluster and its placement group."""

    name: str = key("local", "the option of the group cluster")
    address: str | None = key(None, "null: RAY_ADDRESS if set, else start Ray locally; auto: join this node's cluster")
    num_cpus: int | None = key(None, "CPUs of a local Ray; null: all of the machine")
    num_gpus: int | None = key(None, "GPUs of a local Ray; null: all of the machine")
    gpu_memory_gb: float = key(
        79.0, "GiB per GPU, assumed by mode=check without a GPU; an 80 GB card has 79 usable", positive()
    )
    object_store_mb: int = key(
        1024,
        "MiB of a local Ray's shared memory; a larger weight push spills to disk, 2 s per step with model=smol",
        at_least(bounds.OBJECT_STORE_MIN_MB, "Ray rejects a smaller object store", unit="MiB", use="256"),
    )
    placement: str = key(
        "PACK", "strategy of the placement group", one_of("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
    )
    wait_s: float = key(60.0, "seconds to wait for resources: another run may be ending", at_least(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbConfig:
    """Weights & Biases logging."""

    mode: str = key(
        "off", "off, offline (into the run's folder) or online", one_of("off", "offline", "online"), common=True
    )
    project: str = key("othink_ray", "the project that runs are logged to", not_empty())
    samples_every: int = key(25, "steps between tables of the latest questions, images and answers", at_least(1))

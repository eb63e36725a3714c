"""The whole configuration: each key is declared once, with type, default, bound and comment, in experiment and system.

The defaults that `conf/` starts from, the checks, the error texts, `--help` and `docs/config.md` come from these
declarations.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from othink_ray.config.bounds import MODES, one_of
from othink_ray.config.experiment import AlgoConfig as AlgoConfig
from othink_ray.config.experiment import DataConfig as DataConfig
from othink_ray.config.experiment import EvalConfig as EvalConfig
from othink_ray.config.experiment import FilesConfig as FilesConfig
from othink_ray.config.experiment import ModelConfig as ModelConfig
from othink_ray.config.experiment import PartConfig as PartConfig
from othink_ray.config.experiment import RewardConfig as RewardConfig
from othink_ray.config.experiment import ScenesConfig as ScenesConfig
from othink_ray.config.experiment import SftConfig as SftConfig
from othink_ray.config.experiment import SmolConfig as SmolConfig
from othink_ray.config.experiment import StudyConfig as StudyConfig
from othink_ray.config.experiment import StudyTask as StudyTask
from othink_ray.config.experiment import TinyConfig as TinyConfig
from othink_ray.config.experiment import TrainConfig as TrainConfig
from othink_ray.config.keys import key
from othink_ray.config.system import ClusterConfig as ClusterConfig
from othink_ray.config.system import FaultsConfig as FaultsConfig
from othink_ray.config.system import LearnerConfig as LearnerConfig
from othink_ray.config.system import LoraConfig as LoraConfig
from othink_ray.config.system import RolloutConfig as RolloutConfig
from othink_ray.config.system import RunConfig as RunConfig
from othink_ray.config.system import WandbConfig as WandbConfig
from othink_ray.config.system import WeightsConfig as WeightsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Complete configuration of one run."""

    mode: str = key(
        "train",
        "train (GRPO-D), sft (supervised fine-tuning), eval, study, or check: validate and print the resource plan",
        one_of(*MODES),
        common=True,
    )
    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    study: StudyConfig = field(default_factory=StudyConfig)

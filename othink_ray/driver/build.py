"""Build the parts of a run from its configuration; the only module that chooses concrete classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from othink_ray.config.rules import colocated, needs_reference, transport_of
from othink_ray.config.schema import Config
from othink_ray.core.advantages import ADVANTAGES
from othink_ray.core.kl import BetaSchedule
from othink_ray.core.lr_schedule import learning_rate
from othink_ray.core.packing import LOSS_WEIGHTS, pack_step
from othink_ray.data import LengthFilter
from othink_ray.driver.loop import Recipe
from othink_ray.driver.sft import DemonstrationSource
from othink_ray.engines.base import OPENED, LearnerEngine, RendezvousInfo, RolloutEngine, ServedAdapters, share_of_cores
from othink_ray.runtime.bundles import all_bundles, learner_bundles, rollout_bundles
from othink_ray.runtime.learner_pool import LearnerPool
from othink_ray.runtime.monitoring import Incidents
from othink_ray.runtime.placement import Placement, fits
from othink_ray.runtime.reward_pool import RewardPool
from othink_ray.runtime.rollout_pool import RolloutPool
from othink_ray.runtime.weight_sync import AuditedPush, open_transport
from othink_ray.runtime.worker_group import EvalWorkers, WorkerGroup
from othink_ray.types import Prompt
from othink_ray.weights import Tolerance


def length_filter(config: Config, path: str) -> LengthFilter:
    """Return a check that raises BadRow for a prompt over rollout.max_model_len or rollout.max_images."""
    from othink_ray.families import open_family

    return partial(open_family(config.model, path).check_fits, config.rollout)


def require_targets(config: Config, path: str) -> None:
    """Raise AdapterError if the model or the engine cannot hold the configured adapters, before any process starts."""
    from othink_ray.engines.lora import require_servable
    from othink_ray.families import open_family

    if config.learner.lora.rank:
        require_servable(open_family(config.model, path), config.learner, config.rollout.engine)


def depth(config: Config, path: str) -> int:
    """Return the number of layers, language model and vision tower together."""
    from othink_ray.families import open_family

    family = open_family(config.model, path)
    return len(family.layers(family.meta_network()))


def recipe(config: Config) -> Recipe:
    """Return the algorithm's recipe: advantages, loss weights, packing, loss and importance sampling."""
    algo = config.algo
    return Recipe(
        prompts_per_step=config.train.prompts_per_step,
        updates_per_step=algo.updates_per_step,
        sampling_rounds=algo.sampling_rounds,
        advantages=ADVANTAGES[algo.advantage],
        pack=partial(
            pack_step,
            updates=algo.updates_per_step,
            loss_weights=LOSS_WEIGHTS[algo.loss_weights],
            max_tokens=config.rollout.max_tokens,
            shared_prefix=config.learner.shared_prefix,
        ),
        loss=algo.loss,
        tis=tis_mode(config, stale=False),
        stale_tis=tis_mode(config, stale=True),
    )


def beta_schedule(config: Config) -> BetaSchedule:
    kl = config.algo.kl
    return BetaSchedule(
        name=kl.schedule,
        total=config.train.steps,
        beta_min=kl.beta_min,
        beta_max=kl.beta_max,
        explore_frac=kl.explore_frac,
        target=kl.target,
        adapt_rate=kl.adapt_rate,
    )


def lr_schedule(config: Config) -> Callable[[int], float]:
    """Return the function from step to learning rate."""
    learner = config.learner
    return lambda step: learning_rate(learner.lr_schedule, step, config.train.steps, learner.lr, learner.warmup_frac)


def clip_range(config: Config) -> tuple[float, float]:
    """Return how far the importance ratio may go below and above 1."""
    low, high = config.algo.clip_eps, config.algo.clip_eps_high
    return low, low if high is None else high


def temperature(config: Config) -> float:
    """Return the temperature of the learner's logprobs, and of the engines' in the audit.

    RL trains the distribution that was sampled. Demonstrations were not sampled: trained at a temperature other than 1,
    their probabilities at 1 would differ from their frequencies in the data.
    """
    return config.rollout.temperature if config.mode == "train" else 1.0


def tis_mode(config: Config, *, stale: bool) -> str:
    """Return the importance sampling of off-policy (`stale`) or on-policy answers; resolves algo.tis=auto."""
    if config.algo.tis != "auto":
        return config.algo.tis
    return "token" if stale or config.model.dtype != "float32" else "none"


def cores_shared(config: Config) -> Config:
    """Under train.overlap, divide the cores among all engines and ranks that have no explicit thread count."""
    if not (config.mode == "train" and config.train.overlap):
        return config
    rollout, learner = config.rollout, config.learner
    share = share_of_cores(None, rollout.num_actors + learner.world_size)
    return replace(
        config,
        rollout=replace(rollout, threads=rollout.threads or share),
        learner=replace(learner, threads=learner.threads or share),
    )


def shrink_to_cluster(config: Config, log: Callable[[str], None]) -> Config:
    """Return the config with fewer engines, then fewer ranks, so that the run fits the remaining cluster.

    On shared GPUs each engine goes with its rank. At least one of each is kept, even if that does not fit.
    """
    fewer = config
    while not fits(all_bundles(fewer.learner, fewer.rollout)):
        rollout, learner = fewer.rollout, fewer.learner
        more_engines, more_ranks = rollout.num_actors > 1, learner.world_size > 1
        if not (more_engines or more_ranks):
            break
        if more_engines:
            fewer = replace(fewer, rollout=replace(rollout, num_actors=rollout.num_actors - 1))
        if more_ranks and (colocated(learner, rollout) or not more_engines):
            fewer = replace(fewer, learner=replace(learner, world_size=learner.world_size - 1))
    if fewer is not config:
        log(
            "continuing on the remaining nodes: "
            f"{fewer.rollout.num_actors} of {config.rollout.num_actors} rollout actors, "
            f"{fewer.learner.world_size} of {config.learner.world_size} learner ranks"
        )
    return fewer


@contextmanager
def open_workers(
    config: Config,
    path: str,
    probe_prompts: Sequence[Prompt],
    incidents: Incidents,
    say: Callable[[str], None],
) -> Iterator[WorkerGroup]:
    """Start the rollout, reward and learner processes and load their models."""
    if incidents.restarts and config.faults.lost_node == "continue":
        config = shrink_to_cluster(config, incidents.log)
    config = cores_shared(config)
    bundles = all_bundles(config.learner, config.rollout)
    with Placement(bundles, config.cluster, say, wait_without_limit=incidents.restarts > 0) as placement:
        say(placement.describe())
        learner = LearnerPool(
            partial(learner_engine, config, path, with_reference=needs_reference(config)), config.learner, placement
        )
        rollout = RolloutPool(partial(rollout_engine, config, path), config.rollout, placement, incidents)
        rewards = RewardPool(config.algo.reward, incidents)
        tolerance = Tolerance(config.model.dtype, depth(config, path), config.weights.audit_tolerance)
        for warning in load_models(config, rollout, learner):
            say(warning)
        rewards.wait()
        transport = open_transport(transport_of(config), learner, rollout, config.weights.bucket_mb)
        pusher = AuditedPush(transport, learner, rollout, config.weights, probe_prompts, temperature(config), tolerance)
        yield WorkerGroup(
            rollout=rollout,
            rewards=rewards,
            incidents=incidents,
            learner=learner,
            pusher=pusher,
            sync_new_engines=pusher.sync_new_engines,
            answers=config.algo.group_size,
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            seed=config.train.seed,
        )


def load_models(config: Config, rollout: RolloutPool, learner: LearnerPool) -> list[str]:
    """Load engines and learner in parallel, on shared GPUs one after the other; return the learner's warnings.

    On shared GPUs the engines load first and, with rollout.sleep, sleep before the learner loads.

    A starting vLLM needs its share of the whole device free, and counts memory that others allocate meanwhile as its
    own. An engine that is replaced later starts beside an idle learner, in the memory that mode=check plans for.
    """
    if colocated(config.learner, config.rollout):
        rollout.wait()
        rollout.sleep()
        return learner.wait(learner.start())
    loading = learner.start()
    rollout.wait()
    return learner.wait(loading)


@contextmanager
def open_eval_workers(
    config: Config, path: str, incidents: Incidents, say: Callable[[str], None]
) -> Iterator[EvalWorkers]:
    """Start rollout and reward processes only, with the weights in `path`."""
    with Placement(rollout_bundles(config.rollout), config.cluster, say) as placement:
        rollout = RolloutPool(partial(eval_engine, config, path), config.rollout, placement, incidents)
        rewards = RewardPool(config.algo.reward, incidents)
        rollout.wait()
        rewards.wait()
        yield EvalWorkers(
            rollout=rollout,
            rewards=rewards,
            incidents=incidents,
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            seed=config.train.seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTSession:
    """A learner with the model in one folder, and demonstrations tokenized for it."""

    learner: LearnerPool
    demonstrations: DemonstrationSource


@contextmanager
def open_sft_session(config: Config, folder: Path, say: Callable[[str], None]) -> Iterator[SFTSession]:
    """Start a learner only, for supervised fine-tuning of the model in `folder`."""
    with Placement(learner_bundles(config.learner), config.cluster, say) as placement:
        make_engine = partial(learner_engine, config, str(folder), with_reference=False)
        learner = LearnerPool(make_engine, config.learner, placement)
        for warning in learner.wait(learner.start()):
            say(warning)
        yield SFTSession(learner=learner, demonstrations=open_demonstrations(config, str(folder)))


def open_demonstrations(config: Config, path: str) -> DemonstrationSource:
    from othink_ray.engines.demonstrations import Demonstrations
    from othink_ray.families import open_family

    return Demonstrations(open_family(config.model, path), reasoning=config.sft.reasoning)


def rollout_engine(config: Config, path: str) -> RolloutEngine:
    """Return an engine of the base model, to be updated by weight pushes."""
    from othink_ray.engines.lora import served_adapters
    from othink_ray.families import open_family

    adapters = served_adapters(open_family(config.model, path), config.learner)
    return ROLLOUT_ENGINES[config.rollout.engine](config, path, adapters)


def eval_engine(config: Config, path: str) -> RolloutEngine:
    """Return an engine with the policy in a folder; serve a bfloat16 LoRA export with adapters, as in training."""
    from othink_ray.engines.learner_checkpoint import read_exported

    make_engine, exported = ROLLOUT_ENGINES[config.rollout.engine], read_exported(path, config.model.dtype)
    if exported is None:
        return make_engine(config, path, None)
    engine = make_engine(config, exported.base, exported.adapters)
    engine.begin_push()
    engine.load_weights(exported.factors)
    engine.finish_push(OPENED, buckets=1)
    return engine


def _vllm_engine(config: Config, path: str, adapters: ServedAdapters | None) -> RolloutEngine:
    from othink_ray.engines.policy import trains_all
    from othink_ray.engines.vllm_rollout import VLLMRollout
    from othink_ray.families import open_family

    family = open_family(config.model, path)
    return VLLMRollout(
        config.rollout,
        config.model,
        family,
        path,
        transport=transport_of(config),
        max_logprobs=config.weights.audit_candidates,
        sleep_level=2 if trains_all(config.learner) else 1,
        adapters=adapters,
    )


def _hf_engine(config: Config, path: str, adapters: ServedAdapters | None) -> RolloutEngine:
    from othink_ray.engines.hf_rollout import HFRollout
    from othink_ray.families import open_family

    return HFRollout(config.rollout, config.model, open_family(config.model, path), adapters)


ROLLOUT_ENGINES: dict[str, Callable[[Config, str, ServedAdapters | None], RolloutEngine]] = {
    "vllm": _vllm_engine,
    "hf": _hf_engine,
}


def learner_engine(config: Config, path: str, rendezvous: RendezvousInfo, *, with_reference: bool) -> LearnerEngine:
    from othink_ray.engines.deepspeed_learner import DeepSpeedLearner
    from othink_ray.families import open_family

    return DeepSpeedLearner(
        config.learner,
        open_family(config.model, path),
        dtype=config.model.dtype,
        temperature=temperature(config),
        clip_eps=clip_range(config),
        kl_estimator=config.algo.kl.estimator,
        tis_bounds=(config.algo.tis_floor, config.algo.tis_cap),
        with_reference=with_reference,
        seed=config.train.seed,
        rendezvous=rendezvous,
        shares_gpu=config.rollout.sleep,
    )

"""Which files are mutated, and which tests then must fail: fastest first, since the first failure decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Mutated files and the tests that must notice: paths under the package -> paths under tests/."""

    root: Path  # of the checkout: the package, its tests and what tests read beside them
    pure: Mapping[str, tuple[str, ...]]  # all mutants of these; tried in forks of a process that has imported torch
    heavy: Mapping[str, tuple[str, ...]]  # a sample of the mutants of these; each tried in a process of its own
    sample: int  # how many mutants of `heavy`
    explained: Path  # lines of: file | function | line | change | reason

    def source(self, file: str) -> Path:
        return self.root / "othink_ray" / file

    def covering(self, file: str) -> tuple[str, ...]:
        """Test files for a mutated file, as paths under the root; a file without a line of its own is an error."""
        tests = {**self.pure, **self.heavy}
        if file not in tests:
            raise KeyError(f"tests/mutants/table.py names no tests of {file}: add a line for it")
        return tuple(f"tests/{test}" for test in tests[file])


_PURE = {
    "core/advantages.py": (
        "core/test_advantages.py",
        "core/test_algorithms.py",
    ),
    "core/attention.py": (
        "core/test_packed_sequence.py",
        "core/test_flex.py",
        "core/test_packed_images.py",
        "cpu/test_attention.py",
        "core/test_kernel_memory.py",
        "engines/test_network_memory.py",
    ),
    "core/blocks.py": (
        "core/test_blocks.py",
        "core/test_packed_sequence.py",
        "cpu/test_attention.py",
    ),
    "core/flex.py": (
        "core/test_flex.py",
        "core/test_packed_images.py",
    ),
    "core/intervals.py": ("core/test_intervals.py",),
    "core/kl.py": (
        "core/test_kl.py",
        "core/test_adaptive_kl.py",
        "core/test_algorithms.py",
        "driver/test_loop.py",
    ),
    "core/logprobs.py": ("core/test_logprobs.py",),
    "core/losses.py": (
        "core/test_importance.py",
        "core/test_losses.py",
        "core/test_algorithms.py",
    ),
    "core/lr_schedule.py": ("core/test_lr_schedule.py",),
    "core/packed_sequence.py": (
        "core/test_packed_sequence.py",
        "core/test_flex.py",
        "core/test_algorithms.py",
        "core/test_blocks.py",
        "core/test_losses.py",
        "core/test_importance.py",
    ),
    "core/packing.py": (
        "core/test_packing.py",
        "core/test_algorithms.py",
    ),
    "cpu/kernels.py": (
        "cpu/test_attention.py",
        "cpu/test_matmul.py",
        "cpu/test_absent.py",
    ),
    "driver/async_loop.py": (
        "driver/test_overlap.py",
        "driver/test_small_data.py",
        "driver/test_resume.py",
    ),
    "driver/loop.py": (
        "driver/test_loop.py",
        "driver/test_small_data.py",
        "driver/test_overlap.py",
    ),
    "weights.py": (
        "weights/test_probe_comparison.py",
        "weights/test_audit.py",
        "weights/test_buckets.py",
        "weights/test_mismatches.py",
        "weights/test_digest.py",
    ),
}

_LEARNER = ("engines/test_update.py", "engines/test_learner.py", "engines/test_learner_state.py")
_ENGINE = ("engines/test_receiver.py", "contracts/test_rollout.py", "contracts/test_rollout_push.py")
_PUSH = ("runtime/test_push.py", "runtime/test_bfloat16_push.py", "runtime/test_engine_replacement.py")
_POOLS = ("runtime/test_pools.py", "runtime/test_prefetch.py")

# Ray and vLLM do not survive a fork.
_HEAVY = {
    "engines/base.py": (
        "engines/test_rendezvous.py",
        *_ENGINE,
        "engines/test_update.py",
    ),
    "engines/collate.py": (
        "engines/test_policy.py",
        "engines/test_learner.py",
    ),
    "engines/compiled.py": ("engines/test_compiled.py",),
    "engines/deepspeed_learner.py": (
        "engines/test_devices.py",
        *_LEARNER,
    ),
    "engines/demonstrations.py": (
        "contracts/test_thinking_template.py",
        "weights/test_audit.py",
    ),
    "engines/hf_rollout.py": (
        *("engines/test_devices.py", "contracts/test_adapters.py"),
        *("contracts/test_rollout.py", "contracts/test_rollout_push.py"),
    ),
    "engines/learner_checkpoint.py": (
        "engines/test_export.py",
        "engines/test_adapters.py",
        "engines/test_learner.py",
        "engines/test_stored_state.py",
        "engines/test_learner_state.py",
    ),
    "engines/lora.py": (
        "engines/test_merging.py",
        "engines/test_adapters.py",
        "contracts/test_adapters.py",
        "engines/test_trained_parameters.py",
        "engines/test_learner.py",
    ),
    "engines/network_memory.py": ("engines/test_network_memory.py",),
    "engines/policy.py": (
        "engines/test_merging.py",
        "engines/test_trained_parameters.py",
        "engines/test_policy.py",
        "engines/test_learner.py",
        "contracts/families/test_families.py",
        "engines/test_update.py",
    ),
    "engines/prefetch.py": (
        "engines/test_prefetch.py",
        "engines/test_learner.py",
        "engines/test_prefetch_inputs.py",
        "engines/test_policy.py",
    ),
    "engines/update_stats.py": (
        "engines/test_update_stats.py",
        "engines/test_learner.py",
    ),
    "engines/vllm_patches.py": (
        "engines/test_vllm_kernels.py",
        "contracts/test_rounding.py",
    ),
    "engines/vllm_rollout.py": (
        *_ENGINE,
        "contracts/test_vllm_work.py",
    ),
    "engines/vllm_transfer.py": (
        "gpu/test_rendezvous.py",
        "gpu/test_transfer_sizes.py",
        "contracts/test_rollout_push.py",
        "runtime/test_push.py",
    ),
    "engines/vllm_worker.py": (
        "contracts/test_rollout_push.py",
        "runtime/test_bfloat16_push.py",
        "contracts/test_vllm_work.py",
        "contracts/test_adapters.py",
    ),
    "engines/zero_settings.py": (*_LEARNER,),
    "runtime/actors.py": (
        "runtime/test_actor_calls.py",
        *_POOLS,
        "runtime/test_push.py",
    ),
    "runtime/cluster.py": (
        "runtime/test_cluster.py",
        "runtime/test_job.py",
        "e2e/test_interrupt.py",
        "driver/test_stopping.py",
    ),
    "runtime/futures.py": (
        "runtime/test_futures.py",
        "runtime/test_result_streams.py",
        "runtime/test_pools.py",
        "e2e/test_timeline.py",
    ),
    "runtime/learner_pool.py": (
        "runtime/test_actor_calls.py",
        "runtime/test_learner_prefetch.py",
        "runtime/test_load_order.py",
        "runtime/test_push.py",
    ),
    "runtime/monitoring.py": (
        "runtime/test_gauges.py",
        "runtime/test_incidents.py",
    ),
    "runtime/bundles.py": ("runtime/test_bundles.py",),
    "runtime/placement.py": ("runtime/test_malloc.py", "runtime/test_load_order.py", "runtime/test_pools.py"),
    "runtime/reward_pool.py": (
        "runtime/test_reward_memory.py",
        "runtime/test_pools.py",
    ),
    "runtime/rollout_pool.py": (
        "runtime/test_balance.py",
        *_POOLS,
        "runtime/test_load_order.py",
    ),
    "runtime/weight_sync.py": (
        "runtime/test_actor_calls.py",
        *_PUSH,
        "gpu/test_rendezvous.py",
    ),
    "runtime/worker_group.py": (
        "runtime/test_worker_group.py",
        "driver/test_small_data.py",
        "runtime/test_engine_replacement.py",
    ),
}

TABLE = Table(root=ROOT, pure=_PURE, heavy=_HEAVY, sample=200, explained=Path(__file__).with_name("explained.txt"))

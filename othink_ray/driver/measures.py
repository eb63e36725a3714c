"""A step as numbers, under the names that metrics.jsonl, the console, the report and wandb share."""

from __future__ import annotations

import numpy as np

from othink_ray.driver.loop import Step, teaches

# Which layer of grading decided how many answers of the step.
_GRADED = {
    "rules": "reward/graded_by_rules",
    "symbolic": "reward/graded_symbolically",
    "timeout": "reward/grader_timeouts",
    "crash": "reward/grader_crashes",
    "untagged": "reward/untagged",
}


def taught_measures(step: Step) -> dict[str, float]:
    """The metrics of one step of supervised training: what has no meaning for worked answers is left out."""
    lengths = [len(answer.token_ids) for one in step.scored for answer in one.group.completions]
    seconds = sum(step.times.values())
    return {
        "loss": step.stats.loss,
        "entropy": step.stats.entropy,
        "grad_norm": step.stats.grad_norm,
        "lr": step.stats.lr,
        "tokens/completion_mean": float(np.mean(lengths)),
        "vision/encodes": float(step.stats.vision_encodes),
        "throughput/samples_per_s": len(lengths) / seconds,
        "throughput/tokens_per_s": float(sum(lengths)) / seconds,
        "time/step_s": seconds,
    } | {f"time/{name}_s": lap for name, lap in step.times.items()}


def measures(step: Step) -> dict[str, float]:
    """The metrics of one step. Rewards, lengths and groups are those of all that was asked, trained or not.

    Means of rewards are over valid answers; a masked answer counts only in `groups/masked`.
    """
    asked = step.asked
    valid = np.concatenate([one.valid for one in asked])
    answers = [completion for one in asked for completion in one.group.completions]
    lengths = np.array([len(answer.token_ids) for answer in answers])
    seconds = sum(step.times.values())
    found = {
        "reward/mean": _mean(np.concatenate([one.rewards for one in asked]), valid),
        "kl/beta": step.beta,
        "kl/mean": step.stats.kl_mean,
        "loss": step.stats.loss,
        "audit/logp_gap_mean": step.audit.gap_mean,
        "audit/logp_gap_max": step.audit.gap_max,
        "audit/tolerance": step.audit.tolerance,
        "audit/verified_weights": float(step.audit.verified),
        "push/mb": step.audit.sent_bytes / 2**20,
        "sampler/logp_gap_mean": step.stats.logp_gap_mean,
        "sampler/logp_gap_max": step.stats.logp_gap_max,
        "sampler/staleness": float(np.mean([step.step - one.group.version for one in step.scored])),
        "ratio/raw_mean": step.stats.ratio_raw_mean,
        "ratio/raw_max": step.stats.ratio_raw_max,
        "ratio/clip_frac": step.stats.ratio_clip_frac,
        "ratio/used_mean": step.stats.ratio_used_mean,
        "ratio/truncated_mean": step.stats.ratio_truncated_mean,
        "ratio/truncated_frac": step.stats.ratio_truncated_frac,
        "ratio/masked_frac": step.stats.ratio_masked_frac,
        "ratio/sequence_raw_mean": step.stats.ratio_sequence_raw_mean,
        "ratio/sequence_truncated_mean": step.stats.ratio_sequence_truncated_mean,
        "ratio/sequence_truncated_frac": step.stats.ratio_sequence_truncated_frac,
        "entropy": step.stats.entropy,
        "grad_norm": step.stats.grad_norm,
        "lr": step.stats.lr,
        "tokens/completion_mean": float(lengths.mean()),
        "tokens/cut_frac": float(np.mean([answer.finish == "length" for answer in answers])),
        "groups/constant_frac": float(np.mean([not teaches(one) for one in asked])),
        "groups/asked": float(len(asked)),
        "groups/masked": float((~valid).sum()),
        "rollout/image_encodes": float(sum(one.group.image_encodes for one in asked)),
        "vision/encodes": float(step.stats.vision_encodes),
        "throughput/samples_per_s": len(answers) / seconds,
        "throughput/tokens_per_s": float(lengths.sum()) / seconds,
        "time/step_s": seconds,
        "time/hidden_s": step.hidden_s,
    }
    for layer, name in _GRADED.items():
        found[name] = float(sum(one.graded.get(layer, 0) for one in asked))
    for part in sorted({name for one in asked for name in one.parts}):
        scored = [one for one in asked if part in one.parts]
        values = np.concatenate([one.parts[part] for one in scored])
        found[f"reward/{part}"] = _mean(values, np.concatenate([one.valid for one in scored]))
    return found | {f"time/{name}_s": lap for name, lap in step.times.items()}


def _mean(values: np.ndarray, valid: np.ndarray) -> float:
    return float(values[valid].mean()) if valid.any() else float("nan")

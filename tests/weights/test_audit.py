"""The audit: its arithmetic and messages, and the faults that it detects on a real engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from othink_ray.config.schema import Config
from othink_ray.data import open_source
from othink_ray.engines.base import Sampling
from othink_ray.engines.demonstrations import Demonstrations
from othink_ray.engines.hf_rollout import HFRollout
from othink_ray.engines.policy import Policy
from othink_ray.engines.vllm_rollout import VLLMRollout
from othink_ray.families.base import Family
from othink_ray.types import Audit, PixelDigest, Probe, Prompt
from othink_ray.weights import AuditError, Tolerance, compare, repeated, require_pixels
from tests.engines.samples import ask, batch_of, distributions, give, group_of, row_of, sent_weights, worker_of

CPU = torch.device("cpu")
LAYERS = 5  # of the tiny model, both towers
# A mean gap that cannot be rounding: float32 engines agree to less than 2e-6 on the tiny model.
SHARP = 1e-5


# ---- arithmetic and messages


def probe_of(family: Family, logprobs: list[list[float]]) -> Probe:
    values = np.array(logprobs, dtype=np.float32)
    group = group_of(family, ask("q"), [len(values)], seed=0)
    return Probe(group=group, candidates=np.arange(values.size).reshape(values.shape), logprobs=values)


def test_gaps_are_absolute_and_over_all_candidates(family: Family) -> None:
    probes = [probe_of(family, [[-1.0, -2.0], [-3.0, -4.0]]), probe_of(family, [[-5.0, -6.0]])]
    others = [np.array([[-1.0, -2.5], [-2.0, -4.0]], np.float32), np.array([[-5.0, -6.0]], np.float32)]
    audit = compare(probes, repeated(probes, others), version=3)
    assert (audit.version, audit.tokens) == (3, 6)
    assert audit.gap_mean == pytest.approx(1.5 / 6)
    assert audit.gap_max == pytest.approx(1.0)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_fail_any_tolerance(family: Family, broken: float) -> None:
    probes = [probe_of(family, [[-1.0, -2.0]])]
    audit = compare(probes, repeated(probes, [np.array([[-1.0, broken]], np.float32)]), version=1)
    assert audit.gap_max == float("inf")
    with pytest.raises(AuditError, match="version 1 failed"):
        Tolerance("float32", LAYERS, fixed=1e9).require(audit)


def gap_of(gap: float, logp_mean: float = 1.0) -> Audit:
    return Audit(version=17, gap_mean=gap, gap_max=6 * gap, tokens=192, logp_mean=logp_mean)


def test_a_gap_passes_up_to_a_fixed_tolerance() -> None:
    fixed = Tolerance("bfloat16", LAYERS, fixed=0.01)
    for _ in range(2):  # independent of the measured gap
        assert fixed.require(gap_of(0.01)).tolerance == 0.01
        with pytest.raises(AuditError, match=r"tolerance 0\.01 \(weights\.audit_tolerance\)"):
            fixed.require(gap_of(0.0101))
        fixed.require(gap_of(1e-4))


@pytest.mark.parametrize(("dtype", "eps", "times"), [("float32", 2**-23, 8.0), ("bfloat16", 2**-7, 0.5)])
def test_the_first_gap_is_bounded_by_precision_and_depth(dtype: str, eps: float, times: float) -> None:
    assert eps == torch.finfo(getattr(torch, dtype)).eps
    shallow, deep = Tolerance(dtype, 4), Tolerance(dtype, 36)
    assert deep.of(gap_of(0)) == pytest.approx(3 * shallow.of(gap_of(0)))
    assert shallow.of(gap_of(0)) == pytest.approx(times * eps * 4**0.5)
    with pytest.raises(AuditError, match="from precision and depth"):
        shallow.require(gap_of(1.01 * shallow.of(gap_of(0))))
    assert shallow.measured is None  # a gap that failed is not recorded


def test_later_gaps_may_be_eight_times_the_first() -> None:
    tolerance = Tolerance("bfloat16", LAYERS)
    bound = tolerance.of(gap_of(0))
    tolerance.require(gap_of(bound / 10))
    assert tolerance.of(gap_of(0)) == pytest.approx(0.8 * bound)
    tolerance.require(gap_of(0.799 * bound))  # and does not raise the next tolerance
    with pytest.raises(AuditError, match="from the gap at the first push"):
        tolerance.require(gap_of(0.801 * bound))


@pytest.mark.parametrize(("first", "later"), [(0.0, 0.5), (0.9, 1.0)])
def test_the_later_tolerance_is_clamped(first: float, later: float) -> None:
    tolerance = Tolerance("float32", LAYERS)
    bound = tolerance.of(gap_of(0))
    tolerance.require(gap_of(first * bound))
    assert tolerance.of(gap_of(0)) == pytest.approx(later * bound)


def test_tolerances_scale_with_the_logprobs() -> None:
    """Rounding is relative, and a policy that becomes more confident has candidates at -10 that were at -5."""
    tolerance = Tolerance("bfloat16", LAYERS)
    assert tolerance.of(gap_of(0, 10.0)) == pytest.approx(10 * tolerance.of(gap_of(0, 1.0)))
    assert tolerance.of(gap_of(0, 0.01)) == tolerance.of(gap_of(0, 1.0))
    tolerance.require(gap_of(0.03, 5.0))
    assert tolerance.measured == pytest.approx(0.006)


def test_the_error_names_the_measurement_and_the_causes() -> None:
    with pytest.raises(AuditError) as caught:
        Tolerance("bfloat16", LAYERS).require(Audit(version=17, gap_mean=0.25, gap_max=1.5, tokens=192))
    message = str(caught.value)
    for part in (
        *("version 17", "0.25 nats on average", "1.5 at most", "192 logprobs", "tolerance 0.00873"),
        *("equal bit for bit", "caches", "rollout.temperature", "weights.audit_tolerance"),
    ):
        assert part in message


def test_different_pixels_are_reported_with_their_prompt(family: Family) -> None:
    probes = [probe_of(family, [[-1.0]]), replace(probe_of(family, [[-1.0]]), pixels=PixelDigest(value=7))]
    require_pixels(probes + probes, [PixelDigest(), PixelDigest(value=7)], 3)
    for other in (PixelDigest(value=8), PixelDigest(value=7, dtype="bfloat16")):
        with pytest.raises(AuditError, match=r"version 3 failed: engine and learner have different .* prompt q\."):
            require_pixels(probes, [PixelDigest(), other], 3)


def test_probes_and_answers_must_match_in_number(family: Family) -> None:
    with pytest.raises(ValueError, match="zip"):
        repeated([probe_of(family, [[-1.0]])] * 2, [np.array([[-1.0]], np.float32)])


# ---- on a real engine


def learner_logprobs(policy: Policy, family: Family, probes: Sequence[Probe]) -> list[NDArray[np.float32]]:
    with torch.no_grad():
        whole = distributions(policy, batch_of([row_of(probe.group) for probe in probes], family))
    lengths = [len(probe.candidates) for probe in probes]
    return [
        rows.gather(1, torch.from_numpy(probe.candidates)).numpy()
        for rows, probe in zip(whole[: sum(lengths)].split(lengths), probes, strict=True)
    ]


class Auditor:
    """Runs the probe of the default configuration on an engine and compares it with the learner's policy."""

    def __init__(self, config: Config, family: Family) -> None:
        self.weights, self.family = config.weights, family
        self.tolerance = Tolerance("float32", LAYERS)
        source = open_source(config.data, "test")
        self.prompts: list[Prompt] = [source.prompt(index) for index in range(config.weights.audit_prompts)]
        self.sampling = Sampling(answers=1, max_tokens=config.weights.audit_tokens, temperature=1.0, seed=0)

    def __call__(self, engine: VLLMRollout | HFRollout, policy: Policy) -> Audit:
        probes = engine.probe(self.prompts, self.sampling, self.weights.audit_candidates)
        return compare(probes, repeated(probes, learner_logprobs(policy, self.family, probes)), engine.version)


@pytest.fixture(scope="module")
def audit(config: Config, family: Family) -> Auditor:
    return Auditor(config, family)


@pytest.fixture(scope="module")
def stepped(taught: Policy, family: Family, scenes: Sequence[Prompt], config: Config) -> Policy:
    """Return `taught` after Adam's first step, which moves every weight by the full learning rate."""
    moved = copy.deepcopy(taught)
    logprobs, _ = moved(batch_of([row_of(group) for group in Demonstrations(family).answer(scenes[:8])], family))
    moved.zero_grad()
    (-logprobs.mean()).backward()
    with torch.no_grad():
        for parameter in moved.parameters():
            assert parameter.grad is not None
            parameter.sub_(config.learner.lr * parameter.grad.sign())
    return moved


@pytest.fixture
def engine(vllm_engine: VLLMRollout, taught: Policy, audit: Auditor) -> VLLMRollout:
    """Return an engine with the weights of `taught` and warm caches for the probe."""
    give(vllm_engine, sent_weights(taught.network), 0)
    assert audit.tolerance.require(audit(vllm_engine, taught)).gap_mean < SHARP
    return vllm_engine


def give_keeping(
    engine: VLLMRollout, weights: list[tuple[str, Tensor]], monkeypatch: pytest.MonkeyPatch, *caches: str
) -> None:
    """Push weights without resetting the given caches."""
    with monkeypatch.context() as patched:
        for cache in caches:
            patched.setattr(engine.engine, f"reset_{cache}_cache", lambda: True)
        give(engine, weights, 1)


def test_a_correct_push_passes_with_a_large_margin(
    engine: VLLMRollout, hf_engine: HFRollout, stepped: Policy, audit: Auditor
) -> None:
    for opened in (engine, hf_engine):
        give(opened, sent_weights(stepped.network), 1)
        found = audit(opened, stepped)
        audit.tolerance.require(found)
        assert found.gap_mean < SHARP / 3
        assert found.gap_max < 10 * SHARP
        assert found.tokens == audit.weights.audit_prompts * audit.weights.audit_tokens * audit.weights.audit_candidates


def test_weights_of_the_previous_step_are_detected(engine: VLLMRollout, stepped: Policy, audit: Auditor) -> None:
    found = audit(engine, stepped)
    assert found.gap_mean > 100 * audit.tolerance.of(found)
    with pytest.raises(AuditError):
        audit.tolerance.require(found)


def test_a_stale_copy_of_a_tied_head_is_detected(
    engine: VLLMRollout, stepped: Policy, audit: Auditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs the matrix exists twice: as it is for the embedding, and packed for the head."""
    worker = worker_of(engine).worker  # inside vLLM's wrapper
    head, pack = worker.network.language_model.lm_head, worker.pack
    with monkeypatch.context() as patched:
        patched.setattr(worker, "pack", lambda module: None if module is head else pack(module))
        give(engine, sent_weights(stepped.network), 1)
    with pytest.raises(AuditError):
        audit.tolerance.require(audit(engine, stepped))


@pytest.mark.parametrize("caches", [("prefix",), ("prefix", "encoder")])
def test_caches_kept_across_a_push_are_detected(
    engine: VLLMRollout, stepped: Policy, audit: Auditor, monkeypatch: pytest.MonkeyPatch, caches: Sequence[str]
) -> None:
    give_keeping(engine, sent_weights(stepped.network), monkeypatch, *caches)
    with pytest.raises(AuditError):
        audit.tolerance.require(audit(engine, stepped))


def test_image_features_kept_across_a_push_are_detected(
    engine: VLLMRollout, stepped: Policy, audit: Auditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_keeping(engine, sent_weights(stepped.network), monkeypatch, "encoder")
    with pytest.raises(AuditError):
        audit.tolerance.require(audit(engine, stepped))


def kinds(policy: Policy) -> dict[str, str]:
    """Return one parameter name per kind of layer: the last layer's, whose errors few layers can amplify."""
    last: dict[str, str] = {}
    for name, _ in policy.network.named_parameters():
        if name.endswith(".weight"):
            last[".".join(part for part in name.split(".") if not part.isdigit())] = name
    return last


def test_a_one_percent_error_in_any_layer_is_detected(engine: VLLMRollout, taught: Policy, audit: Auditor) -> None:
    clean = audit(engine, taught)
    gaps = {}
    for name in kinds(taught).values():
        give(engine, [(n, w * 1.01 if n == name else w) for n, w in sent_weights(taught.network)], 1)
        gaps[name] = audit(engine, taught).gap_mean
    # The barely trained vision tower has little effect on the answers, but its errors still exceed rounding.
    in_vision = {name: gap for name, gap in gaps.items() if ".visual." in name}
    in_text = {name: gap for name, gap in gaps.items() if ".visual." not in name}
    assert (len(in_vision), len(in_text)) == (9, 11)
    assert {name: gap for name, gap in in_text.items() if not gap > audit.tolerance.of(clean)} == {}
    assert {name: gap for name, gap in in_vision.items() if not gap > 3 * clean.gap_mean} == {}


def test_a_different_temperature_on_one_side_is_detected(engine: VLLMRollout, taught: Policy, audit: Auditor) -> None:
    other = Policy(taught.network, audit.family, temperature=0.9, logit_rows=64)
    with pytest.raises(AuditError):
        audit.tolerance.require(audit(engine, other))


def test_different_pixels_on_one_side_are_detected(engine: VLLMRollout, taught: Policy, audit: Auditor) -> None:
    probes = engine.probe(audit.prompts, audit.sampling, audit.weights.audit_candidates)
    images = [probe.group.prompt.images for probe in probes]
    swapped = [
        replace(probe, group=replace(probe.group, prompt=replace(probe.group.prompt, images=other)))
        for probe, other in zip(probes, images[1:] + images[:1], strict=True)
    ]
    logprobs = learner_logprobs(taught, audit.family, swapped)
    with pytest.raises(AuditError):
        audit.tolerance.require(compare(swapped, repeated(swapped, logprobs), 0))

"""Chunked token logprobs: values, gradients, and how much memory they need."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.allocations import Allocations
from othink_ray.core.logprobs import candidate_logprobs, token_logprobs
from tests.reference import grpo_d

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def problem(
    dtype: torch.dtype, *, device: str = "cpu", tokens: int = 7, vocabulary: int = 11
) -> tuple[torch.Tensor, ...]:
    """Return random hidden (N, 5), weight (V, 5), targets (N,), bias (V,)."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 5, generator=random, dtype=torch.float64)
    weight = torch.randn(vocabulary, 5, generator=random, dtype=torch.float64)
    targets = torch.randint(0, vocabulary - 1, (tokens,), generator=random)
    bias = torch.randn(vocabulary, generator=random, dtype=torch.float64)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), bias.to(device)


def naive(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute logprobs and entropies from all logits at once, in float64."""
    distribution = torch.distributions.Categorical(logits=(hidden.double() @ weight.double().T + bias) / temperature)
    return distribution.log_prob(targets), distribution.entropy()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_logprobs_equal_the_slow_reference_for_any_chunk(chunk: int, temperature: float) -> None:
    hidden, weight, targets, bias = problem(torch.float64)
    logprobs, _ = token_logprobs(hidden, weight, targets, temperature=temperature, logit_bias=bias, chunk=chunk)
    expected = [
        grpo_d.logprob(row, weight.tolist(), target, bias.tolist(), temperature)
        for row, target in zip(hidden.tolist(), targets.tolist(), strict=True)
    ]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_logits_are_float32_or_wider_for_any_weight_dtype(dtype: torch.dtype, tolerance: float, device: str) -> None:
    hidden, weight, targets, bias = problem(dtype, device=device)
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=1.3, logit_bias=bias, chunk=3)
    expected_logprobs, expected_entropy = naive(hidden, weight, targets, bias, 1.3)
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logprobs.double(), expected_logprobs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",), ("weight",)])
def test_gradients_equal_the_naive_ones(
    trained: tuple[str, ...], dtype: torch.dtype, tolerance: float, device: str
) -> None:
    hidden, weight, targets, bias = problem(dtype, device=device)
    leaves = [{"hidden": hidden, "weight": weight}[name].requires_grad_() for name in trained]
    pull = torch.linspace(-1, 2, len(hidden), device=device)
    logprobs, _ = token_logprobs(hidden, weight, targets, temperature=0.7, logit_bias=bias, chunk=3)
    grads = torch.autograd.grad((pull * logprobs).sum(), leaves)
    expected = torch.autograd.grad((pull * naive(hidden, weight, targets, bias, 0.7)[0]).sum(), leaves)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=tolerance, atol=tolerance)


def test_the_lm_head_gradient_is_accumulated_in_float32() -> None:
    hidden, weight, targets, bias = problem(torch.bfloat16, tokens=512)
    logprobs, _ = token_logprobs(hidden, weight.requires_grad_(), targets, temperature=1.0, logit_bias=bias, chunk=2)
    (found,) = torch.autograd.grad(logprobs.sum(), weight)
    (exact,) = torch.autograd.grad(naive(hidden, weight, targets, bias, 1.0)[0].sum(), weight)
    assert found.dtype == torch.bfloat16
    # Rounded once, at the end; accumulated in bfloat16 it would be off by several percent.
    torch.testing.assert_close(found, exact, rtol=2**-8, atol=2**-8 * exact.abs().max().item() / 100)


def test_gradients_pass_gradcheck() -> None:
    hidden, weight, targets, bias = problem(torch.float64, tokens=4, vocabulary=6)
    bias[5] = -math.inf

    def only_logprobs(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return token_logprobs(hidden, weight, targets, temperature=0.7, logit_bias=bias, chunk=3)[0]

    assert torch.autograd.gradcheck(only_logprobs, (hidden.requires_grad_(), weight.requires_grad_()), atol=1e-6)


def test_a_pass_without_gradients_gives_the_same_numbers() -> None:
    hidden, weight, targets, bias = problem(torch.float32)
    with torch.no_grad():
        reference = token_logprobs(hidden, weight, targets, temperature=1.0, logit_bias=bias, chunk=3)
    trained = token_logprobs(hidden.requires_grad_(), weight, targets, temperature=1.0, logit_bias=bias, chunk=3)
    assert torch.equal(reference[0], trained[0])
    assert torch.equal(reference[1], trained[1])
    assert not reference[0].requires_grad
    assert trained[0].requires_grad
    assert not trained[1].requires_grad


def test_bias_comes_before_temperature_as_in_the_sampler() -> None:
    hidden, weight, targets = torch.zeros(1, 2), torch.zeros(2, 2), torch.tensor([0])
    bias = torch.tensor([1.0, 0.0])
    logprobs, _ = token_logprobs(hidden, weight, targets, temperature=0.5, logit_bias=bias, chunk=1)
    assert logprobs.item() == pytest.approx(-math.log(1 + math.exp(-2)))


def test_a_banned_token_has_zero_probability_and_no_nan() -> None:
    hidden, weight, targets, _ = problem(torch.float64)
    ban = torch.zeros(11, dtype=torch.float64)
    ban[10] = -math.inf
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=1.0, logit_bias=ban, chunk=3)
    without, entropy_without = token_logprobs(hidden, weight[:10], targets, temperature=1.0, logit_bias=None, chunk=3)
    torch.testing.assert_close(logprobs, without)
    torch.testing.assert_close(entropy, entropy_without)
    grad_hidden, grad_weight = torch.autograd.grad(logprobs.sum(), leaves)
    assert torch.isfinite(grad_hidden).all() and torch.isfinite(grad_weight).all()
    assert not grad_weight[10].any()


def test_nan_in_a_row_without_gradient_does_not_spread() -> None:
    hidden, weight, targets, bias = problem(torch.float64)
    hidden[2] = math.nan
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logprobs, _ = token_logprobs(hidden, weight, targets, temperature=1.0, logit_bias=bias, chunk=3)
    grads = torch.autograd.grad(logprobs[[0, 1, 3, 4, 5, 6]].sum(), leaves)
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_no_tokens_give_no_logprobs_and_zero_gradients() -> None:
    hidden, weight = torch.zeros(0, 5, requires_grad=True), torch.ones(11, 5, requires_grad=True)
    logprobs, entropy = token_logprobs(
        hidden, weight, torch.zeros(0, dtype=torch.int64), temperature=1.0, logit_bias=None, chunk=3
    )
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert weight.grad is not None and not weight.grad.any()


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation creates, including in the backward pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def test_no_tensor_grows_beyond_one_chunk_of_logits() -> None:
    tokens, vocabulary, chunk = 64, 1000, 8
    hidden, weight, targets, bias = problem(torch.float32, tokens=tokens, vocabulary=vocabulary)
    with LargestTensor() as largest:
        logprobs, _ = token_logprobs(
            hidden.requires_grad_(), weight.requires_grad_(), targets, temperature=1.0, logit_bias=bias, chunk=chunk
        )
        logprobs.sum().backward()
    assert largest.numel == chunk * vocabulary


class Counted(TorchDispatchMode):
    """Counts the rows of all matmuls that produce logits over `vocabulary` tokens."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and made.shape[1] == self.vocabulary:
            self.rows += len(made)
        return made


@pytest.mark.parametrize(("tokens", "chunk", "recomputed"), [(8, 8, 0), (8, 100, 0), (8, 3, 6), (9, 3, 6)])
def test_the_last_chunks_logits_are_computed_once(tokens: int, chunk: int, recomputed: int) -> None:
    hidden, weight, targets, bias = problem(torch.float32, tokens=tokens)
    with Counted(vocabulary=11) as counted:
        logprobs, _ = token_logprobs(
            hidden.requires_grad_(), weight, targets, temperature=1.0, logit_bias=bias, chunk=chunk
        )
        assert counted.rows == tokens
        logprobs.sum().backward()
    assert counted.rows == tokens + recomputed


@pytest.mark.parametrize("chunk", [3, 4, 100])
@pytest.mark.parametrize("pulled", [[0], [7], [1, 4, 6], [5, 6, 7], list(range(8))])
def test_each_backward_pass_through_a_graph_gives_the_same(pulled: list[int], chunk: int) -> None:
    hidden, weight, targets, bias = problem(torch.float64, tokens=8)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logprobs, _ = token_logprobs(hidden, weight, targets, temperature=0.7, logit_bias=bias, chunk=chunk)
    expected = torch.autograd.grad(naive(hidden, weight, targets, bias, 0.7)[0][pulled].sum(), leaves)
    for again in (True, False):
        torch.testing.assert_close(torch.autograd.grad(logprobs[pulled].sum(), leaves, retain_graph=again), expected)


@pytest.mark.parametrize("tokens", [8, 24])
def test_two_chunks_of_logits_exist_at_a_time(tokens: int) -> None:
    vocabulary, chunk = 10_000, 8
    hidden, weight, targets, bias = problem(torch.float32, tokens=tokens, vocabulary=vocabulary)
    hidden.requires_grad_()  # the weight is frozen, so that everything else is small
    with Allocations(weight) as seen:
        logprobs, _ = token_logprobs(hidden, weight, targets, temperature=0.7, logit_bias=bias, chunk=chunk)
        assert seen.now < 1.5 * chunk * vocabulary * 4
        logprobs.sum().backward()
        assert seen.now < 0.5 * chunk * vocabulary * 4
    assert seen.peak < 2.5 * chunk * vocabulary * 4


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_not_above_zero_is_rejected(temperature: float) -> None:
    hidden, weight, targets, _ = problem(torch.float32)
    with pytest.raises(ValueError, match=r"rollout\.temperature = .* must be above 0"):
        token_logprobs(hidden, weight, targets, temperature=temperature, logit_bias=None, chunk=3)


def test_bad_chunks_and_candidates_are_rejected() -> None:
    hidden, weight, targets, _ = problem(torch.float32)
    with pytest.raises(AssertionError):
        token_logprobs(hidden, weight, targets, temperature=1.0, logit_bias=None, chunk=0)
    with pytest.raises(ValueError, match="shorter"):
        candidate_logprobs(hidden, weight, targets[:4, None], temperature=1.0, logit_bias=None, chunk=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_candidate_logprobs_equal_training_logprobs_exactly(dtype: torch.dtype, chunk: int) -> None:
    hidden, weight, targets, bias = problem(dtype)
    settings: dict[str, Any] = {"temperature": 0.7, "logit_bias": bias, "chunk": chunk}
    candidates = torch.stack([targets, (targets + 3) % 11], dim=1)
    found = candidate_logprobs(hidden, weight, candidates, **settings)
    for column in (0, 1):
        assert torch.equal(found[:, column], token_logprobs(hidden, weight, candidates[:, column], **settings)[0])


class LargestOutput(TorchDispatchMode):
    """Records the largest number of bytes that any operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not func.is_view:
            self.most = max(self.most, found.nbytes)
        return found


@pytest.mark.parametrize(
    ("trained", "tokens", "vocabulary", "chunk"), [("hidden", 4, 1000, 2), ("weight", 1000, 11, 3)]
)
def test_no_gradient_is_allocated_for_frozen_inputs(trained: str, tokens: int, vocabulary: int, chunk: int) -> None:
    hidden, weight, targets, _ = problem(torch.float32, tokens=tokens, vocabulary=vocabulary)
    leaf, frozen = (hidden, weight) if trained == "hidden" else (weight, hidden)
    leaf.requires_grad_()
    with LargestOutput() as made:
        logprobs, _ = token_logprobs(hidden, weight, targets, temperature=1.0, logit_bias=None, chunk=chunk)
        logprobs.sum().backward()
    assert leaf.grad is not None and made.most < frozen.nbytes


@pytest.mark.parametrize("biased", [True, False])
def test_an_audit_does_not_copy_the_lm_head_on_a_gpu(biased: bool) -> None:
    """32 positions of Qwen2-VL-2B in bfloat16: its lm_head has 0.47 GB, and would have 0.93 in float32."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    vocabulary, width, positions = 151_936, 1536, 32
    with FakeTensorMode():
        hidden, weight = (
            torch.empty(rows, width, device="cuda", dtype=torch.bfloat16) for rows in (positions, vocabulary)
        )
        candidates = torch.zeros(positions, 20, dtype=torch.long, device="cuda")
        bias = torch.zeros(vocabulary, device="cuda") if biased else None
        with LargestOutput() as made:
            found = candidate_logprobs(hidden, weight, candidates, temperature=1.0, logit_bias=bias, chunk=8)
    assert found.shape == (positions, 20)
    assert made.most == 8 * vocabulary * 4

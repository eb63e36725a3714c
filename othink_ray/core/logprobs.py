"""Token logprobs from hidden states, computed in chunks so that (N, V) logits never exist at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_NEVER = -1e30  # replaces a bias of -inf: the token's probability is still 0, and so is its entropy term (no 0 * inf)


def token_logprobs(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    logit_bias: torch.Tensor | None,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logprobs of `targets` (N,) and detached entropies (N,) in nats; hidden (N, H), weight (V, H), bias (V,).

    The distribution is the sampler's: softmax((hidden @ weight.T + bias) / temperature); a bias of -inf bans a token.
    Logits are float32 (float64 for float64 inputs); at most `chunk` rows of them exist at a time, including in the
    backward pass, which reuses the forward pass's softmax for the last chunk and recomputes the others.
    """
    if not temperature > 0:
        raise ValueError(
            f"rollout.temperature = {temperature} must be above 0: greedy decoding has no distribution to train"
        )
    assert chunk > 0, chunk
    inputs = (hidden, lm_head_weight, targets, logit_bias, temperature, chunk)
    logprobs, entropy = _TokenLogprobs.apply(*inputs)  # type: ignore[no-untyped-call]
    return logprobs, entropy


def candidate_logprobs(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    candidates: torch.Tensor,
    *,
    temperature: float,
    logit_bias: torch.Tensor | None,
    chunk: int,
) -> torch.Tensor:
    """Return logprobs (N, K) in nats of `candidates` (N, K), with the arithmetic of `token_logprobs`; no gradient."""
    with torch.no_grad():
        return torch.cat(
            [
                _log_softmax(states, lm_head_weight, logit_bias, temperature).gather(1, tokens)
                for states, tokens in zip(hidden.split(chunk), candidates.split(chunk), strict=True)
            ]
        )


class _TokenLogprobs(torch.autograd.Function):
    """Recomputes logits in the backward pass, except for the last chunk, whose log-softmax it saves.

    The backward pass needs memory for one chunk anyway, and a small micro-batch fits in one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        logit_bias: torch.Tensor | None,
        temperature: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if logit_bias is not None:
            logit_bias = logit_bias.clamp(min=_NEVER)
        ctx.save_for_backward(hidden, weight, targets, logit_bias)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.kept, ctx.first_kept = None, 0
        logprobs = hidden.new_empty(len(hidden), dtype=_wide(hidden, weight))
        entropy = torch.empty_like(logprobs)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            log_p = _log_softmax(hidden[rows], weight, logit_bias, temperature)
            logprobs[rows] = log_p.gather(1, targets[rows, None]).squeeze(1)
            entropy[rows] = -log_p.exp().mul_(log_p).sum(dim=1)
            if start + chunk >= len(hidden) and any(ctx.needs_input_grad):
                ctx.kept, ctx.first_kept = log_p, start
            del log_p  # free it before the next chunk allocates
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, _grad_entropy: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None]:
        hidden, weight, targets, _ = ctx.saved_tensors
        wide = _wide(hidden, weight)
        grad_hidden = torch.zeros_like(hidden, dtype=wide) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        # Rows without gradient (masked, or in a group of equal rewards) are skipped, and a NaN in them does not spread.
        for rows, probs in _softmax_of(ctx, grad_logprobs.nonzero().squeeze(1)):
            grad_rows = grad_logprobs[rows] / ctx.temperature
            grad_logits = probs.mul_(-grad_rows[:, None])
            grad_logits.scatter_add_(1, targets[rows, None], grad_rows[:, None])
            if grad_hidden is not None:
                grad_hidden[rows] = _wide_matmul(grad_logits, weight)
            if grad_weight is not None:
                grad_weight += _wide_matmul(grad_logits.T, hidden[rows])
            del probs, grad_logits  # free them before the next chunk allocates
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
        )


def _softmax_of(ctx: Any, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `rows` in chunks, each with its softmax (n, V), which the caller may modify in place."""
    if ctx.kept is not None:
        is_kept = rows >= ctx.first_kept
        indices = rows[is_kept] - ctx.first_kept
        log_p = ctx.kept if len(indices) == len(ctx.kept) else ctx.kept[indices]
        ctx.kept = None  # it is modified in place below, so a second backward pass must recompute it
        yield rows[is_kept], log_p.exp_()
        del log_p
        rows = rows[~is_kept]
    hidden, weight, _, logit_bias = ctx.saved_tensors
    for part in rows.split(ctx.chunk):
        yield part, torch.softmax(_logits(hidden[part], weight, logit_bias, ctx.temperature), dim=1)


def _log_softmax(
    hidden: torch.Tensor, weight: torch.Tensor, logit_bias: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    return torch.log_softmax(_logits(hidden, weight, logit_bias, temperature), dim=1)


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, logit_bias: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """Return logits (n, V) in wide precision: bias first, then temperature, as the sampler does."""
    logits = _wide_matmul(hidden, weight.T, logit_bias)
    return logits if temperature == 1 else logits.div_(temperature)  # saves a pass over n * V numbers


def _wide(left: torch.Tensor, right: torch.Tensor) -> torch.dtype:
    """Return float64 if an input is float64, else float32."""
    return torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)


def _wide_matmul(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return left @ right (+ bias) in wide precision; on GPUs half-precision factors stay half, sums are float32."""
    if right.is_cuda and right.dtype in (torch.bfloat16, torch.float16):
        product = torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
        return product if bias is None else product.add_(bias)
    wide = _wide(left, right)
    if bias is None:
        return left.to(wide) @ right.to(wide)
    return torch.addmm(bias.to(wide), left.to(wide), right.to(wide))

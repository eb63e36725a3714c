"""Float32 matrix products on CPUs by oneDNN: torch's default BLAS is half as fast on processors it is not tuned for."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.library import Library


def onednn_matmul() -> Library:
    """Route this process's float32 matrix products to oneDNN, backward included, while the returned handle lives."""
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*other operators may also be overridden")
        library.impl("mm", _mm, "CPU")
        library.impl("addmm", _addmm, "CPU")
    return library


def onednn_available() -> bool:
    available: bool = torch.backends.mkldnn.is_available()
    return available


def multiply(left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
    """Return left @ right (+ added), computed as under `onednn_matmul`."""
    return _mm(left, right) if added is None else _addmm(added, left, right)


def empty_product(left: Tensor, right: Tensor) -> Tensor:
    """Return uninitialized memory with the shape and strides of `left @ right`."""
    if _transposed_is_faster(left, right):
        return left.new_empty(right.shape[1], left.shape[0]).t()
    return left.new_empty(left.shape[0], right.shape[1])


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if _supported(left) and _supported(right):
        if _transposed_is_faster(left, right):
            return _product(_dense(right).t(), left.t(), None).t()
        return _product(_dense(left), _dense(right), None)
    return torch.mm(left, right, out=empty_product(left, right))  # torch's own kernel: `out=` skips the override


def _addmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == 1 and alpha == 1 and added.dim() == 1 and all(map(_supported, (left, right))):
        return _product(_dense(left), _dense(right), added)
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(added, left, right, beta=beta, alpha=alpha, out=out)


def _transposed_is_faster(left: Tensor, right: Tensor) -> bool:
    """Return whether to compute (right.T @ left.T).T instead: oneDNN copies a transposed left factor."""
    return not left.is_contiguous() and left.t().is_contiguous() and left.shape[0] > right.shape[1]


def _supported(matrix: Tensor) -> bool:
    """Return whether a matrix is float32, not empty, not expanded and not a strided slice of columns."""
    return matrix.dtype == torch.float32 and matrix.numel() > 0 and 1 in matrix.stride()


def _dense(matrix: Tensor) -> Tensor:
    """Copy a slice of a larger matrix: oneDNN multiplies these with reference loops, a thousand times slower."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _product(left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), added, "none", [], "")
    return product

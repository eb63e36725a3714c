"""Float32 matrix products on CPUs by oneDNN: torch asks its BLAS, which is half as fast where it was not made for."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.library import Library


def products_by_onednn() -> Library:
    """As long as what it returns is kept, oneDNN multiplies all float32 matrices of this process, backward included."""
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*other operators may also be overridden")
        library.impl("mm", _mm, "CPU")
        library.impl("addmm", _addmm, "CPU")
    return library


def onednn_is_there() -> bool:
    there: bool = torch.backends.mkldnn.is_available()
    return there


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if _suits(left) and _suits(right):
        if _across(left, right):
            return _product(_whole(right).t(), left.t(), None).t()
        return _product(_whole(left), _whole(right), None)
    return torch.mm(left, right, out=product_place(left, right))  # what torch does otherwise


def _addmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == 1 and alpha == 1 and added.dim() == 1 and all(map(_suits, (left, right))):
        return _product(_whole(left), _whole(right), added)
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(added, left, right, beta=beta, alpha=alpha, out=out)


def multiply(left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
    """As products are while `products_by_onednn` holds."""
    return _mm(left, right) if added is None else _addmm(added, left, right)


def product_place(left: Tensor, right: Tensor) -> Tensor:
    """Empty memory that lies as the product of the two does."""
    if _across(left, right):
        return left.new_empty(right.shape[1], left.shape[0]).t()
    return left.new_empty(left.shape[0], right.shape[1])


def _across(left: Tensor, right: Tensor) -> bool:
    """Whether the product of the factors turned is quicker: oneDNN copies a left one that lies across."""
    return not left.is_contiguous() and left.t().is_contiguous() and left.shape[0] > right.shape[1]


def _suits(matrix: Tensor) -> bool:
    """Neither empty nor expanded nor every other column of a larger one."""
    return matrix.dtype == torch.float32 and matrix.numel() > 0 and 1 in matrix.stride()


def _whole(matrix: Tensor) -> Tensor:
    """A copy of what is cut from a larger matrix: oneDNN multiplies such by plain loops, a thousand times as slow."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _product(left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), added, "none", [], "")
    return product

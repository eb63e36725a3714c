"""oneDNN's matrix products equal torch's for every layout, shape and dtype, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import linear
from torch.testing import assert_close

from othink_ray.cpu.kernels import empty_matmul, onednn_available, onednn_matmul


@pytest.fixture
def by_onednn() -> Iterator[None]:
    assert onednn_available(), "this torch was built without oneDNN"
    handle = onednn_matmul()
    yield
    handle._destroy()


def matrix(rows: int, columns: int, layout: str) -> torch.Tensor:
    made = {
        "rows": lambda: torch.randn(rows, columns),
        "columns": lambda: torch.randn(columns, rows).t(),
        "cut": lambda: torch.randn(rows, columns + 3)[:, 1:-2],
        "crosswise": lambda: torch.randn(2 * rows, 2 * columns)[::2, ::2],
        "expanded": lambda: torch.randn(()).expand(rows, columns),
        "one row": lambda: torch.randn(columns).expand(rows, columns),
        "one column": lambda: torch.randn(rows, 1).expand(rows, columns),
    }
    return made[layout]()


LAYOUTS = ("rows", "columns", "cut", "crosswise", "expanded", "one row", "one column")


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 5, 3), (1, 5, 1), (64, 1, 9), (0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_products_are_exact_for_every_layout(
    by_onednn: None, left: str, right: str, shape: tuple[int, int, int]
) -> None:
    rows, inner, columns = shape
    first, second = matrix(rows, inner, left), matrix(inner, columns, right)
    added = torch.randn(columns)
    exact = (first.double()[:, :, None] * second.double()[None]).sum(1)
    assert_close((first @ second).double(), exact, atol=1e-5, rtol=1e-5)
    assert_close(torch.addmm(added, first, second).double(), exact + added.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("left", ("rows", "columns", "cut"))
@pytest.mark.parametrize("right", ("rows", "columns", "cut"))
@pytest.mark.parametrize(("rows", "columns"), [(7, 3), (3, 7)])
def test_an_empty_product_has_the_strides_of_the_product(
    by_onednn: None, left: str, right: str, rows: int, columns: int
) -> None:
    """The compiler plans with these strides; with others it would copy every product.

    A column-major left factor is multiplied transposed where that copies less.
    """
    first, second = matrix(rows, 5, left), matrix(5, columns, right)
    product, empty = first @ second, empty_matmul(first, second)
    assert (empty.shape, empty.stride()) == (product.shape, product.stride())
    assert product.t().is_contiguous() == (left == "columns" and rows > columns)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_dtypes_are_left_to_torch(by_onednn: None, dtype: torch.dtype) -> None:
    first, second = torch.arange(6).reshape(2, 3).to(dtype), torch.arange(12).reshape(3, 4).to(dtype)
    assert (first @ second).tolist() == [[20, 23, 26, 29], [56, 68, 80, 92]]


def test_addmm_with_alpha_and_beta_is_exact(by_onednn: None) -> None:
    added, first, second = torch.randn(4, 3), torch.randn(4, 5), torch.randn(5, 3)
    assert_close(torch.addmm(added, first, second, beta=0.5, alpha=2.0), 0.5 * added + 2 * (first @ second))


@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (4, 1)])
def test_addmm_with_a_matrix_is_exact(by_onednn: None, shape: tuple[int, int]) -> None:
    added, first, second = torch.randn(shape), torch.randn(4, 5), torch.randn(5, 3)
    exact = (first.double()[:, :, None] * second.double()[None]).sum(1)
    assert_close(torch.addmm(added, first, second).double(), added.double() + exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("left", "right", "copies"), [("rows", "columns", 0), ("cut", "rows", 1), ("cut", "cut", 2)])
def test_only_slices_of_a_larger_matrix_are_copied(by_onednn: None, left: str, right: str, copies: int) -> None:
    """OneDNN multiplies slices with slow reference loops; a copy of any other matrix would be wasted."""
    first, second = matrix(7, 5, left), matrix(5, 3, right)
    with torch.profiler.profile() as profile:
        first @ second
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::copy_") == copies


def test_gradients_of_a_linear_layer_match_torch() -> None:
    inputs = [torch.randn(2, 11, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True), torch.randn(5)]
    grad_output = torch.randn(2, 11, 5)
    plain = torch.autograd.grad(linear(*inputs), inputs[:2], grad_output)
    handle = onednn_matmul()
    ours = torch.autograd.grad(linear(*inputs), inputs[:2], grad_output)
    handle._destroy()
    assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_the_override_ends_when_its_handle_is_dropped() -> None:
    handle = onednn_matmul()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as while_held:
        torch.randn(4, 4) @ torch.randn(4, 4)
    del handle
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as after:
        torch.randn(4, 4) @ torch.randn(4, 4)
    called = [{event.key for event in profile.key_averages()} for profile in (while_held, after)]
    assert ["mkldnn::_linear_pointwise" in keys for keys in called] == [True, False]

"""oneDNN's products are torch's: every layout, shape and type, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import linear
from torch.testing import assert_close

from othink_ray.engines.products import empty_product, onednn_available, onednn_matmul


@pytest.fixture
def by_onednn() -> Iterator[None]:
    assert onednn_available(), "this torch was built without oneDNN"
    kept = onednn_matmul()
    yield
    kept._destroy()


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
def test_a_product_is_right_whatever_its_layout(
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
def test_the_place_of_a_product_lies_as_the_product_does(
    by_onednn: None, left: str, right: str, rows: int, columns: int
) -> None:
    """What the compiler plans with; a place of another shape would be made anew at each product.

    A left factor that lies by columns is multiplied turned where that is less to copy.
    """
    first, second = matrix(rows, 5, left), matrix(5, columns, right)
    product, place = first @ second, empty_product(first, second)
    assert (place.shape, place.stride()) == (product.shape, product.stride())
    assert product.t().is_contiguous() == (left == "columns" and rows > columns)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_types_are_left_to_torch(by_onednn: None, dtype: torch.dtype) -> None:
    first, second = torch.arange(6).reshape(2, 3).to(dtype), torch.arange(12).reshape(3, 4).to(dtype)
    assert (first @ second).tolist() == [[20, 23, 26, 29], [56, 68, 80, 92]]


def test_a_sum_with_factors_is_right(by_onednn: None) -> None:
    added, first, second = torch.randn(4, 3), torch.randn(4, 5), torch.randn(5, 3)
    assert_close(torch.addmm(added, first, second, beta=0.5, alpha=2.0), 0.5 * added + 2 * (first @ second))


@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (4, 1)])
def test_a_sum_with_a_matrix_is_right(by_onednn: None, shape: tuple[int, int]) -> None:
    added, first, second = torch.randn(shape), torch.randn(4, 5), torch.randn(5, 3)
    exact = (first.double()[:, :, None] * second.double()[None]).sum(1)
    assert_close(torch.addmm(added, first, second).double(), added.double() + exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("left", "right", "copies"), [("rows", "columns", 0), ("cut", "rows", 1), ("cut", "cut", 2)])
def test_only_what_is_cut_from_a_larger_matrix_is_copied(by_onednn: None, left: str, right: str, copies: int) -> None:
    """OneDNN multiplies a cut one by plain loops; a copy of another is time and memory for nothing."""
    first, second = matrix(7, 5, left), matrix(5, 3, right)
    with torch.profiler.profile() as seen:
        first @ second
    assert sum(one.count for one in seen.key_averages() if one.key == "aten::copy_") == copies


def test_the_gradients_of_a_layer_are_those_of_torch() -> None:
    given = [torch.randn(2, 11, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True), torch.randn(5)]
    pulled = torch.randn(2, 11, 5)
    plain = torch.autograd.grad(linear(*given), given[:2], pulled)
    kept = onednn_matmul()
    ours = torch.autograd.grad(linear(*given), given[:2], pulled)
    kept._destroy()
    assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_it_ends_when_it_is_not_kept() -> None:
    kept = onednn_matmul()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as while_kept:
        torch.randn(4, 4) @ torch.randn(4, 4)
    del kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as after:
        torch.randn(4, 4) @ torch.randn(4, 4)
    called = [{event.key for event in seen.key_averages()} for seen in (while_kept, after)]
    assert ["mkldnn::_linear_pointwise" in keys for keys in called] == [True, False]

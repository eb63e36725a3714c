"""The network's layers compiled: what is done element by element runs in one pass over memory.

Attention stays as it is. So do matrix products, which torch's compiler would give to its BLAS: `by_onednn` keeps them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from othink_ray.engines.products import multiply, product_place
from othink_ray.families.base import Family


def compile_layers(family: Family, network: nn.Module, *, by_onednn: bool) -> None:
    """Compiled when first called, for any number of tokens; the compiler keeps its results on disk."""
    # Fused operations round half-precision numbers as single ones do, and as the rollout engine does.
    options: dict[str, Any] = {"emulate_precision_casts": True}
    if by_onednn:
        options["post_grad_custom_post_pass"] = _Products()
    for layer in family.layers(network):
        layer.forward = torch.compile(layer.forward, dynamic=True, options=options)


class _Products(CustomGraphPass):
    """Puts oneDNN's float32 products in the place of torch's."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target in _PRODUCTS and node.meta["val"].dtype == torch.float32 and not node.kwargs:
                with graph.inserting_before(node):
                    product = _product(graph, node)
                node.replace_all_uses_with(product)
                graph.erase_node(node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _product(graph: Graph, node: Node) -> Node:
    """What is added to each row goes along; a whole matrix, such as a layer's input, is added by whoever comes next."""
    ours = torch.ops.othink_ray.product.default
    factors: tuple[Any, ...] = node.args
    *added, left, right = factors
    if not added:
        product = graph.call_function(ours, (left, right, None))
    elif added[0].meta["val"].dim() == 1:
        product = graph.call_function(ours, (left, right, added[0]))
    else:
        alone = graph.call_function(ours, (left, right, None))
        alone.meta["val"] = ours(*(factor.meta["val"] for factor in (left, right)), None)
        product = graph.call_function(torch.ops.aten.add.Tensor, (added[0], alone))
    product.meta.update(node.meta)
    return product


_LIBRARY = torch.library.Library("othink_ray", "FRAGMENT")
_LIBRARY.define("product(Tensor left, Tensor right, Tensor? added) -> Tensor")
_LIBRARY.impl("product", multiply, "CPU")


def _place(left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
    return product_place(left, right) if added is None else left.new_empty(left.shape[0], right.shape[1])


torch.library.register_fake("othink_ray::product", _place, lib=_LIBRARY)

"""Compilation of the network's layers: elementwise operations are fused into one pass over memory.

Attention is left alone. Matrix products, which torch's compiler would send to its BLAS, stay with oneDNN on request.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from othink_ray.cpu.kernels import empty_matmul, matmul
from othink_ray.families.base import Family


def compile_layers(family: Family, network: nn.Module, *, by_onednn: bool) -> None:
    """Compile each layer at its first call, for any number of tokens; the compiler caches its results on disk."""
    # Fused operations round half-precision numbers as eager ones do, and as the rollout engine does.
    options: dict[str, Any] = {"emulate_precision_casts": True}
    if by_onednn:
        options["post_grad_custom_post_pass"] = _OneDNNMatmuls()
    for layer in family.layers(network):
        layer.forward = torch.compile(layer.forward, dynamic=True, options=options)


class _OneDNNMatmuls(CustomGraphPass):
    """Graph pass that replaces torch's float32 matrix products by oneDNN's."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target in _MATMULS and node.meta["val"].dtype == torch.float32 and not node.kwargs:
                with graph.inserting_before(node):
                    product = _matmul_node(graph, node)
                node.replace_all_uses_with(product)
                graph.erase_node(node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _matmul_node(graph: Graph, node: Node) -> Node:
    """Insert the oneDNN product of `node` and return its result.

    A bias vector is added inside the product; a whole matrix, such as a residual, by an add that the compiler can fuse.
    """
    ours = torch.ops.othink_ray.matmul.default
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
_LIBRARY.define("matmul(Tensor left, Tensor right, Tensor? added) -> Tensor")
_LIBRARY.impl("matmul", matmul, "CPU")


def _fake_matmul(left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
    return empty_matmul(left, right) if added is None else left.new_empty(left.shape[0], right.shape[1])


torch.library.register_fake("othink_ray::matmul", _fake_matmul, lib=_LIBRARY)

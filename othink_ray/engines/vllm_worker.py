"""What is reached into inside vLLM's workers: weights written over in place, images counted as they are looked at.

vLLM imports this in every process that holds a part of the network, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.layers import utils
from vllm.platforms import current_platform

import othink_ray.engines.vllm_rounding  # noqa: F401  # patches vLLM in this process

_pack = utils.dispatch_cpu_unquantized_gemm

if current_platform.is_cpu():
    # Its kernels work on packed copies, and it drops what was packed; kept, a push can write over it by name. This must
    # stand before a network is loaded, in that same process: only an import is early enough.
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: _pack(layer, remove_weight=False)


class WorkerExtension:
    """Becomes a base class of vLLM's worker; `collective_rpc` calls it by name."""

    model_runner: Any

    def open_network(self) -> None:
        self.network = self.model_runner.get_model()
        self.named = dict(self.network.named_parameters(remove_duplicate=False))
        self.packed = [module for module in self.network.modules() if hasattr(module, "cpu_linear")]
        self.images = 0
        self.embed = self.network.embed_multimodal
        self.network.embed_multimodal = self.embed_counted

    def images_encoded(self) -> int:
        return self.images

    def write_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """By their Hugging Face names. A matrix that two modules share, as a tied head, is packed for both."""
        written = {id(self.named[name]) for name in self.network.load_weights(weights)}
        for module in self.packed:
            if id(module.weight) in written:
                _pack(module, remove_weight=False)

    def embed_counted(self, **pixels: Any) -> Any:
        """vLLM's own, counted: one embedding an image."""
        embeddings = self.embed(**pixels)
        self.images += len(embeddings)
        return embeddings

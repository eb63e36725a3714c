"""What is reached into inside vLLM's worker: weights written over in place, images counted as they are looked at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def keep_weights() -> None:
    """vLLM's CPU kernels work on packed copies, and it drops what was packed; kept, a push can write over it by name.

    For models that are loaded from now on.
    """
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: pack(layer, remove_weight=False)


class Worker:
    """The network of an engine in this process."""

    def __init__(self, worker: Any) -> None:
        self.network = worker.model_runner.get_model()
        self.weights = dict(self.network.named_parameters(remove_duplicate=False))
        self.packed = [module for module in self.network.modules() if hasattr(module, "cpu_linear")]
        self.image_encodes = 0
        self.embed_images = self.network.embed_multimodal
        self.network.embed_multimodal = self._embed_images

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """By their Hugging Face names. A matrix that two modules share, as a tied head, is packed for both."""
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        written = {id(self.weights[name]) for name in self.network.load_weights(weights)}
        for module in self.packed:
            if id(module.weight) in written:
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def _embed_images(self, **pixels: Any) -> Any:
        """vLLM's own, counted: one embedding an image."""
        embeddings = self.embed_images(**pixels)
        self.image_encodes += len(embeddings)
        return embeddings

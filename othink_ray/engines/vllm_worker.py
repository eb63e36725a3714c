"""What is reached into inside vLLM's workers: weights written over in place, images counted as they are looked at.

vLLM imports this in every process that holds a part of the network, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers import utils
from vllm.platforms import current_platform

import othink_ray.engines.vllm_rounding  # noqa: F401  # patches vLLM in this process
from othink_ray.engines.vllm_regions import Region, find_regions, unreached
from othink_ray.weights.arrival import Held, HeldPart
from othink_ray.weights.digest import TensorDigest, piece_digest, read_back

_READ_BACK = 8192  # elements of each packed matrix: of one stale by an update at lr 1e-6 in bfloat16, 1 % differ

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
        named = self.network.named_modules()
        self.packed = [(name, module) for name, module in named if hasattr(module, "cpu_linear")]
        self.regions: dict[str, list[Region]] = {}
        self.images = 0
        self.embed = self.network.embed_multimodal
        self.network.embed_multimodal = self.embed_counted

    def images_encoded(self) -> int:
        return self.images

    def write_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """By their Hugging Face names. A matrix that two modules share, as a tied head, is packed for both."""
        written = {id(self.named[name]) for name in self.network.load_weights(weights)}
        for _, module in self.packed:
            if id(module.weight) in written:
                self.pack(module)

    def pack(self, module: Any) -> None:
        _pack(module, remove_weight=False)

    def held_weights(self, expected: Mapping[str, TensorDigest], version: int, complete: bool) -> Held:
        """What this worker computes with: digests of its parts of `expected`, and which packed matrices are stale.

        `complete`: these are all weights of the model, so that a parameter which holds none of them is a fault.
        """
        new = {name: weight for name, weight in expected.items() if name not in self.regions}
        if new:
            self.regions |= find_regions(self.network, new)
        faults = dict(self._stale_copies(version))
        if complete:
            regions = (region for name in expected for region in self.regions[name])
            faults |= dict.fromkeys(unreached(self.network, regions), "is not reached by any weight of the learner")
        return Held(parts=self._digests(expected), faults=faults)

    def _digests(self, expected: Mapping[str, TensorDigest]) -> dict[str, HeldPart]:
        """Of what is held of each, as if it had the precision in which it was sent: a CPU kernel has wider biases."""
        parameters = dict(self.network.named_parameters(remove_duplicate=False))
        names, values, elements = [], [], []
        for name, weight in expected.items():
            pieces = list(self._used(name, parameters))
            if pieces:
                own = [piece_digest(piece.to(weight.dtype), row, column) for piece, row, column in pieces]
                names.append(name)
                values.append(torch.stack(own).sum())
                elements.append(sum(piece.numel() for piece, _, _ in pieces))
        return {
            name: HeldPart(value=value, elements=count)
            for name, value, count in zip(names, read_back(values), elements, strict=True)
        }

    def _used(self, name: str, parameters: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, int, int]]:
        """What this worker computes with of a weight that was sent: pieces (rows, columns), and where they begin."""
        for region in self.regions[name]:
            yield region.of(parameters), region.first_row, region.first_column

    def _stale_copies(self, version: int) -> Iterator[tuple[str, str]]:
        """Packed matrices that are not their parameter: unit vectors, multiplied by a matrix, are columns of it.

        Exact in any precision. Which columns are read changes from push to push.
        """
        for name, module in self.packed:
            weight = module.weight.detach()
            height, width = weight.shape
            count = min(width, -(-_READ_BACK // height))
            columns = (torch.arange(count) + version * count) % width
            units = torch.zeros(count, width, dtype=weight.dtype)
            units[torch.arange(count), columns] = 1
            if not torch.equal(module.cpu_linear(units, weight, None), weight[:, columns].T):
                yield f"{name}.weight", "is newer than the packed copy that the CPU kernel multiplies with"

    def embed_counted(self, **pixels: Any) -> Any:
        """vLLM's own, counted: one embedding an image."""
        embeddings = self.embed(**pixels)
        self.images += len(embeddings)
        return embeddings

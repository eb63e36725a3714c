"""Extension of vLLM's workers: receives pushed weights and adapter factors, and digests the weights in use.

vLLM renames, fuses, pads and shards Hugging Face weights. Where each one lies in a worker's parameters is learned from
vLLM's own loader: it runs once on meta tensors, and each copy that it would make is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import get_current_vllm_config
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

import othink_ray.engines.vllm_patches  # noqa: F401  # patches vLLM in this process
from othink_ray.weights import ShardDigest, TensorDigest, WorkerDigests, as_matrix, read_back, shard_digest

_READ_BACK = 8192  # elements checked per packed matrix: an update at lr 1e-6 in bfloat16 changes about 1 % of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A view of a parameter that holds a shard of a weight, the weight seen as a matrix (first dimension, rest)."""

    parameter: str
    offset: int  # in elements, from the start of the parameter
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first_row: int
    first_column: int

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the current values (rows, columns)."""
        parameter = parameters[self.parameter].detach()
        offset = parameter.storage_offset() + self.offset
        return as_matrix(parameter.as_strided(self.shape, self.strides, offset))


def find_regions(network: Any, expected: Mapping[str, TensorDigest]) -> dict[str, list[Region]]:
    """Return the regions that each weight of `expected` fills in this worker, without changing any parameter."""
    blank = {name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, weight in expected.items()}
    names = {_storage(weight): name for name, weight in blank.items()}
    owners = {
        parameter.untyped_storage().data_ptr(): (name, parameter)
        for name, parameter in network.named_parameters(remove_duplicate=False)
    }
    with _RecordedCopies() as recorded:
        network.load_weights(blank.items())
    regions: dict[str, list[Region]] = {name: [] for name in expected}
    for target, source in recorded.copies:
        name = names.get(_storage(source))
        row_length = prod(expected[name].shape[1:]) if name else 0
        if name is None or not _in_order(source, target, row_length):
            raise NotImplementedError(
                f"vLLM changes weights of {type(network).__name__} while it loads them (into a parameter of shape "
                f"{tuple(target.shape)}): their digests cannot be compared with the learner's; use rollout=hf"
            )
        parameter_name, parameter = owners[target.untyped_storage().data_ptr()]
        first_row, first_column = divmod(source.storage_offset(), row_length)
        regions[name].append(
            Region(
                parameter=parameter_name,
                offset=target.storage_offset() - parameter.storage_offset(),
                shape=tuple(target.shape),
                strides=target.stride(),
                first_row=first_row,
                first_column=first_column,
            )
        )
    return regions


def unreached(network: nn.Module, regions: Iterable[Region]) -> Iterator[str]:
    """Yield the parameters that no region covers, such as a head that is no longer tied to its embedding."""
    reached = {region.parameter for region in regions}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    same = {id(parameters[name]) for name in reached}
    for name, parameter in network.named_parameters():
        if parameter.numel() and id(parameter) not in same:
            yield name


class _RecordedCopies(TorchDispatchMode):
    """Records copies from meta tensors instead of running them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta:
            self.copies.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity


def _in_order(source: Tensor, target: Tensor, row_length: int) -> bool:
    """Return whether a copy reads whole rows, or one column range of each row, in order."""
    if source.shape != target.shape or not source.numel():
        return False
    return bool(source[0].is_contiguous()) and (len(source) == 1 or source.stride(0) == row_length)


_pack = utils.dispatch_cpu_unquantized_gemm


def _add_one_adapter(
    wrapper: Any,
    y: Tensor,
    x: Tensor,
    a_stacked: Sequence[Tensor],
    b_stacked: Sequence[Tensor],
    scale: float,
    output_slices: Sequence[int],
    **_: Any,
) -> None:
    """Add scale * x A^T B^T to y (tokens, out) in place, each column slice with its own factors.

    All requests have the same adapter or none. vLLM's CPU implementation gathers a copy of A and B for every token.
    """
    if wrapper.no_lora:
        return
    columns = y.split(list(output_slices), dim=1)
    for part, a, b in zip(columns, a_stacked, b_stacked, strict=True):
        part.addmm_(x @ a[0, 0].T, b[0, 0].T, alpha=scale)


def _pack_and_keep(layer: Any, remove_weight: bool) -> None:
    """Pack a matrix for the CPU kernel and keep the original, so that a push can overwrite it by name.

    With adapters no push brings a matrix, and the packed copy is enough: half the memory of all linear layers.
    An embedding is only looked up, never multiplied: it is not packed. A tied head packs the matrix for itself.
    """
    if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
        return
    _pack(layer, remove_weight=remove_weight and get_current_vllm_config().lora_config is not None)


if current_platform.is_cpu():
    # vLLM's CPU kernels multiply with packed copies, and vLLM drops the originals. The patch must precede the loading
    # of a network in the worker's process: only an import is early enough.
    utils.dispatch_cpu_unquantized_gemm = _pack_and_keep
    PunicaWrapperCPU.add_lora_linear = _add_one_adapter


class WorkerExtension:
    """Mixin that vLLM adds to its worker class; `collective_rpc` calls its methods by name."""

    model_runner: Any

    def open_network(self) -> None:
        """Find the loaded network's parameters and packed matrices; count the images that it encodes from now on."""
        self.network = self.model_runner.get_model()
        self.named = dict(self.network.named_parameters(remove_duplicate=False))
        named = self.network.named_modules()
        self.packed = [
            (name, module) for name, module in named if hasattr(module, "cpu_linear") and module.weight.numel()
        ]
        self.regions: dict[str, list[Region]] = {}
        self.factors: dict[str, Tensor] = {}
        self.images = 0
        self.embed = self.network.embed_multimodal
        self.network.embed_multimodal = self.embed_counted

    def images_encoded(self) -> int:
        return self.images

    @torch.inference_mode()
    def clear_image_features(self) -> None:
        """Zero the image features that Qwen3-VL's first text layers add to their input, as vLLM does after each use.

        vLLM allocates them with the weights, but in a plain list of tensors: waking from sleep at level 2 restores only
        buffers, and a step that prefills no image reads this memory as it is.
        """
        for features in getattr(self.network, "deepstack_input_embeds", ()):
            features.zero_()

    def write_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Load weights by Hugging Face name, and repack the written matrices, a head tied to the embedding included."""
        written = {id(self.named[name]) for name in self.network.load_weights(weights)}
        for _, module in self.packed:
            if id(module.weight) in written:
                self.pack(module)

    def pack(self, module: Any) -> None:
        _pack(module, remove_weight=False)

    def held_weights(self, expected: Mapping[str, TensorDigest], version: int, complete: bool) -> WorkerDigests:
        """Return digests of this worker's parts of `expected`, read from the weights in use, and the faults found.

        Faults are stale packed matrices and, if `complete` (`expected` names all weights of the model), parameters that
        hold none of them. With an adapter only its factors are digested: vLLM's loader does not know adapted layers.
        """
        if self.factors:
            return WorkerDigests(shards=self._digests(expected), faults=dict(self._stale_copies(version)))
        new = {name: weight for name, weight in expected.items() if name not in self.regions}
        if new:
            self.regions |= find_regions(self.network, new)
        faults = dict(self._stale_copies(version))
        if complete:
            regions = (region for name in expected for region in self.regions[name])
            faults |= dict.fromkeys(unreached(self.network, regions), "is not reached by any weight of the learner")
        return WorkerDigests(shards=self._digests(expected), faults=faults)

    def _digests(self, expected: Mapping[str, TensorDigest]) -> dict[str, ShardDigest]:
        """Digest this worker's part of each weight in the dtype in which it was sent: CPU kernels hold wider biases."""
        parameters = dict(self.network.named_parameters(remove_duplicate=False))
        names, values, elements = [], [], []
        for name, weight in expected.items():
            shards = list(self._used(name, parameters))
            if shards:
                partial = [shard_digest(shard.to(weight.dtype), row, column) for shard, row, column in shards]
                names.append(name)
                values.append(torch.stack(partial).sum())
                elements.append(sum(shard.numel() for shard, _, _ in shards))
        return {
            name: ShardDigest(value=value, elements=count)
            for name, value, count in zip(names, read_back(values), elements, strict=True)
        }

    def _used(self, name: str, parameters: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, int, int]]:
        """Yield this worker's shards (rows, columns) of a weight, and their first row and column in the whole."""
        if name in self.factors:
            yield self._served(name, self.factors[name])
            return
        for region in self.regions[name]:
            yield region.of(parameters), region.first_row, region.first_column

    def _stale_copies(self, version: int) -> Iterator[tuple[str, str]]:
        """Yield (weight name, fault) of the packed matrices that differ from their parameter.

        A unit vector times a matrix is one of its columns, exactly in any precision. The columns that are read change
        from push to push.
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

    def write_factors(self, factors: Sequence[tuple[str, Tensor]]) -> None:
        """Store these factors until `serve_adapter`; other factors keep their values."""
        for name, factor in factors:
            if self._whole_layers and (used := self._buffer(name, factor)).shape != factor.shape:
                raise RuntimeError(
                    f"{name} has shape {tuple(factor.shape)}, but vLLM's layer takes {tuple(used.shape)}"
                )
        self.factors |= dict(factors)

    def serve_adapter(self, number: int) -> None:
        """Copy the stored factors into the buffers of vLLM's adapted layers.

        The buffers keep their addresses, so that captured CUDA graphs stay valid.
        """
        rank = max(_rank(name, factor) for name, factor in self.factors.items())
        adapter = LoRAModel.from_lora_tensors(
            number,
            self.factors,
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # scale 1: B is pushed scaled
            device="cpu",
            dtype=self._adapters.lora_config.lora_dtype,
            weights_mapper=self._rename,
        )
        self._adapters.remove_adapter(number)
        self._adapters.add_adapter(adapter)
        self._adapters.activate_adapter(number)

    def used_factors(self) -> dict[str, Tensor]:
        """Return the factors in use by pushed name, without vLLM's padding of the rank.

        Under tensor parallelism, a factor is this process's shard of A or B.
        """
        return {name: self._buffer(name, factor) for name, factor in self.factors.items()}

    def _served(self, name: str, factor: Tensor) -> tuple[Tensor, int, int]:
        """Return this process's shard of a factor, and its first row and column in the whole factor."""
        shard, layer = self._buffer(name, factor), self._layer(name)[0]
        row, column = (
            layer.tp_rank * (whole // held) // layer.tp_size * held
            for whole, held in zip(factor.shape, shard.shape, strict=True)
        )
        return shard, row, column

    def _buffer(self, name: str, factor: Tensor) -> Tensor:
        """Return a view into vLLM's buffer; KeyError where vLLM has no adapted layer of that name."""
        layer, part, is_a = self._layer(name)
        rank = _rank(name, factor)
        view: Tensor = layer.lora_a_stacked[part][0, 0, :rank] if is_a else layer.lora_b_stacked[part][0, 0, :, :rank]
        return view

    def _layer(self, name: str) -> tuple[Any, int, bool]:
        """Return vLLM's layer of a factor, the index of its fused part, and whether the factor is A."""
        module, is_a = parse_fine_tuned_lora_name(name, self._rename)
        layer, part = self._adapters.modules.get(module), 0
        for packed, members in self._adapters.packed_modules.items():
            if module in members:
                layer, part = self._adapters.modules[packed], members.index(module)
        if layer is None:
            raise KeyError(f"vLLM has no adapted layer for {name}")
        return layer, part, is_a

    @property
    def _adapters(self) -> Any:
        return self.model_runner.lora_manager._adapter_manager

    @property
    def _rename(self) -> Any:
        """Return vLLM's mapper from Hugging Face names to its own."""
        return self.network.hf_to_vllm_mapper.get_rename_mapper()

    @property
    def _whole_layers(self) -> bool:
        return all(layer.tp_size == 1 for layer in self._adapters.modules.values())

    def embed_counted(self, **pixels: Any) -> Any:
        """Call vLLM's `embed_multimodal` and count its embeddings, one per image."""
        embeddings = self.embed(**pixels)
        self.images += len(embeddings)
        return embeddings


def _rank(name: str, factor: Tensor) -> int:
    return factor.shape[0] if name.endswith(".lora_A.weight") else factor.shape[1]

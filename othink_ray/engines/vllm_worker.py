"""Where in a worker's parameters each Hugging Face weight lies: vLLM renames, fuses, pads and shards them.

vLLM's own loader says it: it is run once on weights without memory, and each copy that it would make is noted.
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

from othink_ray.weights.digest import Held, HeldPart, TensorDigest, as_matrix, piece_digest, read_back


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A part of a parameter, and which part of a weight, as a matrix (first dimension, all others), it holds."""

    parameter: str
    offset: int  # in elements, from the parameter's first one
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first_row: int
    first_column: int

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What it holds now, (rows, columns)."""
        parameter = parameters[self.parameter].detach()
        offset = parameter.storage_offset() + self.offset
        return as_matrix(parameter.as_strided(self.shape, self.strides, offset))


def find_regions(network: Any, expected: Mapping[str, TensorDigest]) -> dict[str, list[Region]]:
    """The regions of each of these weights, in this worker. The parameters stay as they are."""
    blank = {name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, weight in expected.items()}
    names = {_storage(weight): name for name, weight in blank.items()}
    owners = {
        parameter.untyped_storage().data_ptr(): (name, parameter)
        for name, parameter in network.named_parameters(remove_duplicate=False)
    }
    with _NotedCopies() as noted:
        network.load_weights(blank.items())
    regions: dict[str, list[Region]] = {name: [] for name in expected}
    for target, source in noted.copies:
        name = names.get(_storage(source))
        row_length = prod(expected[name].shape[1:]) if name else 0
        if name is None or not _in_order(source, target, row_length):
            raise NotImplementedError(
                f"vLLM changes weights of {type(network).__name__} while it loads them (into a parameter of shape "
                f"{tuple(target.shape)}): that they arrived cannot be proven"
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
    """Parameters of which no weight is any part, such as a head that no longer is the embedding that it is tied to."""
    reached = {region.parameter for region in regions}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    same = {id(parameters[name]) for name in reached}
    for name, parameter in network.named_parameters():
        if parameter.numel() and id(parameter) not in same:
            yield name


class _NotedCopies(TorchDispatchMode):
    """Notes copies from tensors without memory instead of making them."""

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
    """Whether a copy takes elements of whole rows, or the same range of each, one after the other."""
    if source.shape != target.shape or not source.numel():
        return False
    return bool(source[0].is_contiguous()) and (len(source) == 1 or source.stride(0) == row_length)


_READ_BACK = 8192  # elements of each packed matrix: of one stale by an update at lr 1e-6 in bfloat16, 1 % differ

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
    """y (tokens, out) += scale * x A^T B^T, each slice of its columns with factors of its own, in place.

    All requests have the same adapter or none. vLLM's own way on CPUs gathers a copy of A and B for every token.
    """
    if wrapper.no_lora:
        return
    columns = y.split(list(output_slices), dim=1)
    for part, a, b in zip(columns, a_stacked, b_stacked, strict=True):
        part.addmm_(x @ a[0, 0].T, b[0, 0].T, alpha=scale)


def _pack_and_keep(layer: Any, remove_weight: bool) -> None:
    """Pack a matrix and keep it beside its copy, so that a push can write over it by name.

    Where adapters are served no push brings a matrix, and the copy is enough: half the memory of all linear layers.
    An embedding is looked up in and never multiplied by: it needs no copy. A tied head packs the matrix for itself.
    """
    if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
        return
    _pack(layer, remove_weight=remove_weight and get_current_vllm_config().lora_config is not None)


if current_platform.is_cpu():
    # Its kernels work on packed copies, and it drops what was packed. This must stand before a network is loaded, in
    # that same process: only an import is early enough.
    utils.dispatch_cpu_unquantized_gemm = _pack_and_keep
    PunicaWrapperCPU.add_lora_linear = _add_one_adapter


class WorkerExtension:
    """Becomes a base class of vLLM's worker; `collective_rpc` calls it by name."""

    model_runner: Any

    def open_network(self) -> None:
        self.network = self.model_runner.get_model()
        self.named = dict(self.network.named_parameters(remove_duplicate=False))
        named = self.network.named_modules()
        self.packed = [(name, each) for name, each in named if hasattr(each, "cpu_linear") and each.weight.numel()]
        self.regions: dict[str, list[Region]] = {}
        self.factors: dict[str, Tensor] = {}
        self.images = 0
        self.embed = self.network.embed_multimodal
        self.network.embed_multimodal = self.embed_counted

    def images_encoded(self) -> int:
        return self.images

    @torch.inference_mode()
    def clear_image_features(self) -> None:
        """Zero what Qwen3-VL's first text layers add to their input, as vLLM leaves it after a step with images.

        vLLM allocates it with the weights, but as a plain list of tensors: after sleep at level 2 it restores buffers
        alone, and a step in which no image is prefilled reads these as they are.
        """
        for features in getattr(self.network, "deepstack_input_embeds", ()):
            features.zero_()

    def write_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """By their Hugging Face names. A head that shares its matrix with the embedding is packed anew with it."""
        written = {id(self.named[name]) for name in self.network.load_weights(weights)}
        for _, module in self.packed:
            if id(module.weight) in written:
                self.pack(module)

    def pack(self, module: Any) -> None:
        _pack(module, remove_weight=False)

    def held_weights(self, expected: Mapping[str, TensorDigest], version: int, complete: bool) -> Held:
        """What this worker computes with: digests of its parts of `expected`, and which packed matrices are stale.

        `complete`: these are all weights of the model, so that a parameter which holds none of them is a fault.

        With an adapter these are its factors; the layers around it are not those that vLLM's loader knows.
        """
        if self.factors:
            return Held(parts=self._digests(expected), faults=dict(self._stale_copies(version)))
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
        if name in self.factors:
            yield self._served(name, self.factors[name])
            return
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

    def write_factors(self, factors: Sequence[tuple[str, Tensor]]) -> None:
        """Keep these until `serve_adapter`; the others stay as they are."""
        for name, factor in factors:
            if self._whole_layers and (used := self._buffer(name, factor)).shape != factor.shape:
                raise RuntimeError(f"{name} is {tuple(factor.shape)}, but vLLM's layer takes {tuple(used.shape)}")
        self.factors |= dict(factors)

    def serve_adapter(self, number: int) -> None:
        """Copy the factors that were written into the buffers from which vLLM's layers add to their products.

        The buffers stay where they are, so that CUDA graphs that were captured with them go on.
        """
        rank = max(_rank(name, factor) for name, factor in self.factors.items())
        adapter = LoRAModel.from_lora_tensors(
            number,
            self.factors,
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # a scale of 1: it is in the pushed B
            device="cpu",
            dtype=self._adapters.lora_config.lora_dtype,
            weights_mapper=self._rename,
        )
        self._adapters.remove_adapter(number)
        self._adapters.add_adapter(adapter)
        self._adapters.activate_adapter(number)

    def used_factors(self) -> dict[str, Tensor]:
        """What the layers of this process add their factors from, by pushed name: without vLLM's padding of the rank.

        Under tensor parallelism of A or B the part that is this process's.
        """
        return {name: self._buffer(name, factor) for name, factor in self.factors.items()}

    def _served(self, name: str, factor: Tensor) -> tuple[Tensor, int, int]:
        """This process's part of a factor, and at which row and column of the whole it begins."""
        part, layer = self._buffer(name, factor), self._layer(name)[0]
        rows, columns = (
            layer.tp_rank * (whole // own) // layer.tp_size * own
            for whole, own in zip(factor.shape, part.shape, strict=True)
        )
        return part, rows, columns

    def _buffer(self, name: str, factor: Tensor) -> Tensor:
        """A view into vLLM's buffer; KeyError where it has no layer of that name to adapt."""
        layer, part, is_a = self._layer(name)
        rank = _rank(name, factor)
        view: Tensor = layer.lora_a_stacked[part][0, 0, :rank] if is_a else layer.lora_b_stacked[part][0, 0, :, :rank]
        return view

    def _layer(self, name: str) -> tuple[Any, int, bool]:
        """vLLM's layer of a factor, which of its parts that is for, and whether the factor is A."""
        module, is_a = parse_fine_tuned_lora_name(name, self._rename)
        layer, part = self._adapters.modules.get(module), 0
        for packed, members in self._adapters.packed_modules.items():
            if module in members:
                layer, part = self._adapters.modules[packed], members.index(module)
        if layer is None:
            raise KeyError(f"vLLM has no layer to adapt for {name}")
        return layer, part, is_a

    @property
    def _adapters(self) -> Any:
        return self.model_runner.lora_manager._adapter_manager

    @property
    def _rename(self) -> Any:
        """From Hugging Face names to vLLM's."""
        return self.network.hf_to_vllm_mapper.get_rename_mapper()

    @property
    def _whole_layers(self) -> bool:
        return all(layer.tp_size == 1 for layer in self._adapters.modules.values())

    def embed_counted(self, **pixels: Any) -> Any:
        """vLLM's own, counted: one embedding an image."""
        embeddings = self.embed(**pixels)
        self.images += len(embeddings)
        return embeddings


def _rank(name: str, factor: Tensor) -> int:
    return factor.shape[0] if name.endswith(".lora_A.weight") else factor.shape[1]

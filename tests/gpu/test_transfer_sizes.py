"""vLLM's weight transfer with the names and sizes of every public model, by its real senders and receivers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from othink_ray.config.load import load
from othink_ray.engines.base import RendezvousInfo
from othink_ray.engines.vllm_transfer import open_sender
from tests.gpu import fake_device
from tests.gpu.public_models import PUBLIC, WEIGHTS, public_network

CONF = Path(__file__).parents[2] / "conf/model"
RENDEZVOUS = RendezvousInfo(rank=0, world_size=1, master_address="127.0.0.1", master_port=1)
BUCKET = load([]).weights.bucket_mb * 2**20
EMBEDDINGS = {  # bytes in bfloat16, vocabulary times width times 2
    "qwen2_vl_2b": 151_936 * 1536 * 2,
    "qwen2_vl_7b": 152_064 * 3584 * 2,
    "qwen2_5_vl_3b": 151_936 * 2048 * 2,
    "qwen2_5_vl_7b": 152_064 * 3584 * 2,
    "qwen3_vl_2b": 151_936 * 2048 * 2,
    "qwen3_vl_4b": 151_936 * 2560 * 2,
    "internvl3_1b": 151_674 * 896 * 2,
    "internvl3_8b": 151_674 * 3584 * 2,
}


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with fake_device.device(meta=True):
        yield


@pytest.fixture(scope="module", params=PUBLIC)
def network(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, public_network(request.param)


class Model(nn.Module):
    """A model that records the weights it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[tuple[str, torch.dtype, torch.Size]] = []

    def load_weights(self, weights: Any) -> None:
        self.loaded += [(name, weight.dtype, weight.shape) for name, weight in weights]


class Engines:
    """One engine in this process with vLLM's receiver; `test_reload` covers the reload around it."""

    def __init__(self, backend: str) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        self.model = Model()
        config = SimpleNamespace(parallel_config=SimpleNamespace(), model_config=None)
        where = torch.device("meta", 0)
        self.receiver = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=backend), config, where, self.model
        )
        self.buckets: list[int] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.receiver.init_transfer_engine(self.receiver.parse_init_info(init_info))

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None:
        self.buckets.append(sum(update_info["tensor_sizes"]))
        self.receiver.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def trained(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()


def described(network: nn.Module) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, weight.dtype, weight.shape) for name, weight in trained(network)]


def test_the_public_models_match_conf() -> None:
    paths = {file.stem: yaml.safe_load(file.read_text()).get("path") for file in CONF.glob("*.yaml")}
    assert {name for name, path in paths.items() if path and "/" in path} == set(PUBLIC) == set(EMBEDDINGS)


def test_a_public_model_has_its_stated_number_of_weights(network: tuple[str, nn.Module]) -> None:
    name, built = network
    assert sum(weight.numel() for weight in built.parameters()) == pytest.approx(WEIGHTS[name], rel=5e-4)
    largest = max(built.parameters(), key=lambda weight: weight.nbytes)
    assert largest.nbytes == EMBEDDINGS[name] > BUCKET


def test_every_weight_of_a_public_model_arrives_by_ipc(network: tuple[str, nn.Module]) -> None:
    name, built = network
    engines = Engines("ipc")
    sender = open_sender("ipc", lambda: trained(built), engines, RENDEZVOUS, port=0, receivers=1, bucket_bytes=BUCKET)
    sender.send_weights()
    assert engines.model.loaded == described(built)
    assert max(engines.buckets) <= EMBEDDINGS[name]
    assert len(engines.buckets) > 2  # and not everything in one bucket


def test_an_ipc_bucket_has_the_configured_size_if_all_fits() -> None:
    weights = [(str(number), torch.empty(300, dtype=torch.bfloat16, device="meta")) for number in range(10)]
    engines = Engines("ipc")
    open_sender(
        "ipc", lambda: iter(weights), engines, RENDEZVOUS, port=0, receivers=1, bucket_bytes=1300
    ).send_weights()
    assert engines.buckets == [1200] * 5


def test_nccl_sender_and_receiver_cut_equal_buckets(network: tuple[str, nn.Module]) -> None:
    """NCCL buckets have no size limit: the weight that fills a bucket closes it, however large it is."""
    from vllm.distributed.weight_transfer.packed_tensor import (
        packed_nccl_broadcast_consumer,
        packed_nccl_broadcast_producer,
    )

    name, built = network
    sent, received, loaded = RecordingGroup(), RecordingGroup(), Model()
    packed_nccl_broadcast_producer(trained(built), sent, 0, lambda item: item[1], BUCKET)
    described_shapes = ((name, (shape, dtype)) for name, dtype, shape in described(built))
    packed_nccl_broadcast_consumer(described_shapes, received, 0, loaded.load_weights, BUCKET, device="meta")
    assert sent.sizes == received.sizes
    assert max(sent.sizes) <= BUCKET + EMBEDDINGS[name]
    assert loaded.loaded == described(built)


class RecordingGroup:
    """A process group that records the sizes of its broadcasts."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def broadcast(self, tensor: Tensor, src: int) -> None:
        self.sizes.append(tensor.numel())

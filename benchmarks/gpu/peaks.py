"""How many operations a GPU can make: its maker's figure, or what a large product reaches."""

from __future__ import annotations

import time

import torch

# Dense bfloat16 products a second, without sparsity. The first name that is part of the device's counts.
PEAKS = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
)
_TRIES = 10


def peak(name: str) -> float | None:
    """Operations a second of the device called `name`, where its maker's figure is known."""
    return next((figure for known, figure in PEAKS if known in name), None)


def measured_peak(device: torch.device, side: int) -> float:
    """Operations a second of the best of some products of two square bfloat16 matrices."""
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(_TRIES):
        settle(device)
        start = time.perf_counter()
        torch.mm(left, right)
        settle(device)
        seconds.append(time.perf_counter() - start)
    return float(2 * side**3 / min(seconds))


def settle(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mfu(operations: float, seconds: float, peak: float) -> float:
    """Share of the peak that the model's own operations reach; what is computed again does not count."""
    return operations / seconds / peak

"""Peak FLOP/s of a GPU: the vendor's figure, or the rate that a large matmul reaches."""

from __future__ import annotations

import time

import torch

# Dense bfloat16 FLOP/s, without sparsity. The first name contained in the device's name applies.
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
    """Return the vendor's FLOP/s for a device name, or None for an unknown device."""
    return next((flops for device, flops in PEAKS if device in name), None)


def measured_peak(device: torch.device, side: int) -> float:
    """Return the FLOP/s of the fastest of several matmuls of two square bfloat16 matrices."""
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(_TRIES):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(2 * side**3 / min(seconds))


def synchronize(device: torch.device) -> None:
    """Wait for all queued work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mfu(operations: float, seconds: float, peak: float) -> float:
    """Return the model FLOPs utilization, a share of the peak; recomputed operations do not count."""
    return operations / seconds / peak

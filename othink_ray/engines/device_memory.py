"""Device memory between processes that share a GPU."""

from __future__ import annotations

import torch


def release_cache(device: torch.device) -> None:
    """Return freed blocks to the device. torch's allocator keeps them otherwise, and no other process can have them."""
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""Ray, started here or joined; left as it was found."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from othink_ray.config.schema import ClusterConfig


class ClusterError(RuntimeError):
    """The cluster cannot hold the run; says what is missing."""


@contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[None]:
    """Ray for the time of a run; without `cluster.address` it starts here, unless a submitted job is inside one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a CPU actor keeps its view of the GPUs
    import ray

    address = cluster.address or os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": None}
    if address is None:
        settings |= {
            "address": "local",
            "num_cpus": cluster.num_cpus,
            "num_gpus": cluster.num_gpus,
            "object_store_memory": cluster.object_store_mb * 2**20,
            "include_dashboard": False,
        }
    else:
        settings["address"] = address
    try:
        ray.init(**settings)
    except ConnectionError as error:
        raise ClusterError(
            f"cluster.address = {address}: no Ray cluster answers there ({error}). Start one with `ray start --head`, "
            "or set cluster.address=null to start Ray on this machine."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()

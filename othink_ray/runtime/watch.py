"""Detects that Ray is gone before Ray's C++ code exits the driver, which prints raylet logs and runs no cleanup."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

_EVERY_S = 1.0
_MARGIN_S = 3.0  # before Ray's own patience with its GCS ends
_RAY_WAITS_S = 60.0  # Ray's default of the setting named next
_RAY_WAITS = "RAY_gcs_rpc_server_reconnect_timeout_s"


@contextmanager
def watching(lost: Callable[[str], None]) -> Iterator[None]:
    """Run a thread that calls `lost` once, with the reason, when this node's raylet or the GCS is gone."""
    import ray

    context = ray.get_runtime_context()
    sockets = {node["NodeID"]: node["RayletSocketName"] for node in ray.nodes()}
    with socket.socket(socket.AF_UNIX) as raylet:
        raylet.connect(sockets[context.get_node_id()])
        over, end = socket.socketpair()
        watch = threading.Thread(target=_watch, args=(raylet, context.gcs_address, over, lost), daemon=True)
        watch.start()
        try:
            yield
        finally:
            end.close()
            watch.join()
            over.close()


def kill_own_ray() -> None:
    """Kill the raylet that this process started, and its children: they outlive a dead GCS by minutes."""
    for raylet in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if raylet.name() == "raylet":
                for process in (*raylet.children(recursive=True), raylet):
                    process.kill()


def agents() -> list[psutil.Process]:
    """Return Ray's agents if this process started Ray: they outlive it by a minute if it is killed all at once."""
    raylets = [child for child in psutil.Process().children() if child.name() == "raylet"]
    return [agent for raylet in raylets for agent in raylet.children()]


def kill_children() -> None:
    """Kill all processes that this one started, and theirs."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _watch(raylet: socket.socket, gcs: str, over: socket.socket, lost: Callable[[str], None]) -> None:
    """A raylet never writes to a client that sends nothing: a readable socket means that the connection is closed."""
    host, _, port = gcs.rpartition(":")
    patience = float(os.environ.get(_RAY_WAITS, _RAY_WAITS_S)) - _MARGIN_S
    seen = time.monotonic()
    while True:
        readable = select.select([raylet, over], [], [], _EVERY_S)[0]
        if over in readable:
            return
        if raylet in readable:
            return lost("Ray's raylet on this node has ended, or was killed")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_EVERY_S).close()
            seen = time.monotonic()
        except OSError as error:
            if time.monotonic() - seen > patience:
                return lost(f"Ray's GCS at {gcs} has not answered for {patience:.0f} s ({error})")

"""A run that was handed in with `ray job submit`: how long it has when it is told to stop."""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import select
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from othink_ray.config.schema import ClusterConfig


def short_notice() -> str | None:
    """What to say of a job that would be killed seconds after it was told to stop."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or "RAY_JOB_STOP_WAIT_TIME_S" in os.environ:
        return None
    return (
        "`ray job stop` kills this run 3 seconds after it asks it to end, which may be too soon to finish a step and "
        "save it; submit it with --runtime-env launch/job.yaml for 10 minutes"
    )


_OF_OUR_OWN = {
    # It dies with the run: what is left when that is killed looks for it no longer than this.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    # Nobody looks into it: no lists of tasks, no statistics of itself, no reading of logs, no spare processes, on cores
    # that engines need.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_io_context_monitor_probe_interval_ms": "60000",
    "RAY_io_context_event_loop_lag_collection_interval_ms": "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "1e9",
    "RAY_prestart_worker_first_driver": "0",
}
_SIGACTION_BYTES = 256  # more than a struct sigaction has
_GPU_NAME = "accelerator_type:"  # Ray's resource of a node that has GPUs


class ClusterError(RuntimeError):
    """The cluster cannot hold the run; says what is missing."""


def prepare(cluster: ClusterConfig) -> None:
    """What Ray reads from the environment when it is imported.

    It listens on every interface, and whoever gets in can run code: one that starts here lets in this run alone.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a CPU actor keeps its view of the GPUs
    if _address(cluster) is None and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def close_token_file() -> str | None:
    """Takes the token of a cluster that is joined away from other users; what to say of it, if they had it."""
    if os.environ.get("RAY_AUTH_MODE") != "token" or "RAY_AUTH_TOKEN" in os.environ:
        return None
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not file.is_file() or not stat.S_IMODE(file.stat().st_mode) & 0o077:
        return None
    try:
        file.chmod(0o600)
    except OSError as error:
        raise ClusterError(
            f"{file}: other users can read this token, and with it run code as you ({error.strerror}); "
            "let its owner say chmod 600, and make a new one"
        ) from error
    return f"{file}: other users could read this token, and with it run code as you; they no longer can. Make a new one"


def private_folder() -> Path:
    """A folder that only this user can enter, for what Ray makes in it: that is open to everybody."""
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / f"ray-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():  # somebody else was there first
        return Path(tempfile.mkdtemp(prefix="ray-", dir=folder.parent))
    folder.chmod(0o700)
    return folder


@contextmanager
def _restore_sigterm_handler() -> Iterator[None]:
    """Ray installs handlers of its own while it starts: they exit the process in the midst of anything."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if callable(own):
            own(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, own)


@contextmanager
def _hold_sigterm_handler() -> Iterator[None]:
    """Ray's C++ part resets SIGTERM to its default action when it ends, a second before ray.shutdown returns."""
    libc, handler, over = ctypes.CDLL(None), ctypes.create_string_buffer(_SIGACTION_BYTES), threading.Event()
    libc.sigaction(signal.SIGTERM, None, handler)

    def hold() -> None:
        while not over.wait(0.0005):
            libc.sigaction(signal.SIGTERM, handler, None)

    holding = threading.Thread(target=hold, daemon=True)
    try:
        holding.start()
        yield
    finally:
        over.set()
        holding.join()
        libc.sigaction(signal.SIGTERM, handler, None)


def _address(cluster: ClusterConfig) -> str | None:
    return cluster.address or os.environ.get("RAY_ADDRESS")


@contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[None]:
    """Ray for the time of a run; without `cluster.address` it starts here, unless a submitted job is inside one.

    A process that is connected already stays so: that Ray is its owner's.
    """
    prepare(cluster)
    import ray

    if ray.is_initialized():
        yield
        return
    address = _address(cluster)
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": None}
    if address is None:
        for name, value in _OF_OUR_OWN.items():
            os.environ.setdefault(name, value)
        settings |= {
            "address": "local",
            "num_cpus": cluster.num_cpus,
            "num_gpus": cluster.num_gpus,
            "object_store_memory": cluster.object_store_mb * 2**20,
            "include_dashboard": False,
            "_temp_dir": str(private_folder() / "ray"),
        }
    else:
        settings["address"] = address
    try:
        with _restore_sigterm_handler():
            ray.init(**settings)
    except Exception as error:  # Ray has no kind of its own for this
        raise ClusterError(_why_not_up(address, error)) from error
    try:
        yield
    finally:
        with _hold_sigterm_handler():
            ray.shutdown()


def machines() -> list[dict[str, Any]]:
    """Each node of the Ray that is up: its host and what Ray may hand out there."""
    import ray

    return [
        {
            "host": node["NodeManagerHostname"],
            "cpus": node["Resources"].get("CPU", 0),
            "gpus": node["Resources"].get("GPU", 0),
            "gpu_names": sorted(
                name.removeprefix(_GPU_NAME) for name in node["Resources"] if name.startswith(_GPU_NAME)
            ),
        }
        for node in ray.nodes()
        if node["Alive"]
    ]


def _why_not_up(address: str | None, error: Exception) -> str:
    first_line = str(error).partition("\n")[0]
    if address is None:
        return f"Ray did not start on this machine: {first_line} A busy machine can be too slow for it: try again."
    return (
        f"cluster.address = {address}: no Ray cluster answers there ({first_line}). Start one with `ray start --head`, "
        "or set cluster.address=null to start Ray on this machine."
    )


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


def kill_local_ray() -> None:
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

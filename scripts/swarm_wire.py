"""Plain TCP for `scripts/bench swarm`: what the network gives one stream, and a file sent to one after the other.

swarm_wire.py receive HOST:PORT FILE      one connection after another into FILE (`-`: nowhere), until killed
swarm_wire.py send FILE BYTES HOST:PORT…  to each in turn; a JSON line for each: seconds, from connecting to the ack
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

CHUNK = 1 << 20
WAIT_S = 600.0
ACK = b"k"


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def receive(where: str, out: str) -> None:
    listener = socket.create_server(address(where))
    print(json.dumps({"event": "ready"}), flush=True)
    while True:
        wire, _ = listener.accept()
        with wire:
            wire.settimeout(WAIT_S)
            take(wire, out)


def take(wire: socket.socket, out: str) -> None:
    """Eight bytes of length, then as many into the file, synced; then the ack."""
    left = int.from_bytes(wire.recv(8, socket.MSG_WAITALL), "big")
    buffer = memoryview(bytearray(CHUNK))
    with ExitStack() as stack:
        file = None if out == "-" else stack.enter_context(Path(out).open("wb"))
        while left > 0 and (n := wire.recv_into(buffer[: min(CHUNK, left)])):
            left -= n
            if file:
                file.write(buffer[:n])
        if file:
            file.flush()
            os.fsync(file.fileno())
    if left == 0:
        wire.sendall(ACK)


def send(path: str, n_bytes: int, wheres: list[str]) -> None:
    with Path(path).open("rb") as file:
        for where in wheres:
            began = time.monotonic()
            with socket.create_connection(address(where), WAIT_S) as wire:
                wire.sendall(n_bytes.to_bytes(8, "big"))
                wire.sendfile(file, 0, n_bytes)
                if wire.recv(1) != ACK:
                    sys.exit(f"{where} did not take all of it")
            print(json.dumps({"event": "sent", "seconds": time.monotonic() - began, "n_bytes": n_bytes}), flush=True)


def main() -> None:
    match sys.argv[1:]:
        case ["receive", where, out]:
            receive(where, out)
        case ["send", path, n_bytes, *wheres] if wheres:
            send(path, int(n_bytes), wheres)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()

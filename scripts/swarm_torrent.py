"""libtorrent for `scripts/bench swarm`: one node with its default settings, in an environment of its own.

    swarm_torrent.py make FILE TORRENT               a v2 torrent of FILE
    swarm_torrent.py run TORRENT FOLDER SEED [HOST…] a node; SEED is 1 where FOLDER holds the file

`run` prints `ready`, begins when a line comes on stdin, knows all other nodes as peers from then on, prints `complete`,
and serves until stdin ends. The functions above `main` run in the benchmark itself, without libtorrent.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

REQUIREMENT = "libtorrent==2.1.1"
INSTALL_S = 300.0
PORT = 6881
RECONNECT_S = 0.5
POLL_MS = 20


def installed(folder: Path) -> Path | str:
    """The Python of an environment with libtorrent in it, made once; or why there is none."""
    python, marker = folder / "bin" / "python", folder / "is-complete"
    if marker.exists():
        return python
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", REQUIREMENT]
    try:
        for argv in ([sys.executable, "-m", "venv", "--clear", str(folder)], pip):
            subprocess.run(argv, check=True, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.CalledProcessError as exc:
        return f"{REQUIREMENT} cannot be installed: {exc.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired:
        return f"{REQUIREMENT} was not installed within {INSTALL_S:g} s"
    marker.touch()
    return python


def say(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, "at": time.monotonic(), **facts}), flush=True)


def make(path: Path, torrent: Path) -> None:
    import libtorrent as lt

    files = lt.file_storage()
    lt.add_files(files, str(path))
    made = lt.create_torrent(files, flags=lt.create_torrent.v2_only)
    lt.set_piece_hashes(made, str(path.parent))
    torrent.write_bytes(lt.bencode(made.generate()))


def run(torrent: Path, folder: Path, seed: bool, others: list[str]) -> None:
    import libtorrent as lt

    session = lt.session({"listen_interfaces": f"0.0.0.0:{PORT}"})
    say("ready")
    sys.stdin.readline()
    params = lt.add_torrent_params()
    params.ti = lt.torrent_info(str(torrent))
    params.save_path = str(folder)
    if seed:
        params.flags |= lt.torrent_flags.seed_mode
    handle = session.add_torrent(params)
    say("begun")
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    told, next_connect = seed, 0.0
    while not ended.is_set():
        now = time.monotonic()
        if not seed and now >= next_connect:
            connect(handle, others)
            next_connect = now + RECONNECT_S
        if not told and handle.status().is_seeding:
            told = True
            say("complete", cpu_s=time.process_time())
        ended.wait(POLL_MS / 1000)
    say("end", uploaded=handle.status().total_payload_upload, cpu_s=time.process_time())


def connect(handle: Any, others: list[str]) -> None:
    """To those that are not connected: a node that had nothing to say at first hangs up."""
    connected = {peer.ip[0] for peer in handle.get_peer_info()}
    for host in others:
        if host not in connected:
            handle.connect_peer((host, PORT))


def main() -> None:
    match sys.argv[1:]:
        case ["make", path, torrent]:
            make(Path(path), Path(torrent))
        case ["run", torrent, folder, seed, *others]:
            run(Path(torrent), Path(folder), seed == "1", others)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()

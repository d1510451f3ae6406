"""Stand-ins for llama.cpp's programs: scripts that say and do what the smoke test asks for, or fail as told."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path

WORKING_SERVER = """\
import http.server, json, sys
if "--version" in sys.argv:
    print("version: 0.0.0 (build {build}, commit x)"); sys.exit()
if "--list-devices" in sys.argv:
    print("Available devices:"); print("  (none)"); sys.exit()
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(data))); self.end_headers()
        self.wfile.write(data)
    def do_GET(self): self.answer({{"status": "ok"}})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"])); self.answer({{"tokens_predicted": {tokens}}})
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""

WORKING_WORKER = """\
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("-p") + 1])))
while True:
    stream, _ = listener.accept()
    stream.recv(33, socket.MSG_WAITALL)
    stream.sendall((28).to_bytes(8, "little") + bytes({protocol}) + bytes(25))
    stream.close()
"""


def server_script(build: int = 0, tokens: int = 1) -> str:
    return f"#!{sys.executable} -IS\n" + WORKING_SERVER.format(build=build, tokens=tokens)


def worker_script(protocol: tuple[int, int, int] = (7, 0, 0)) -> str:
    return f"#!{sys.executable} -IS\n" + WORKING_WORKER.format(protocol=list(protocol))


def shell_script(text: str) -> str:
    return f"#!/bin/sh\n{text}\n"


def make_engine(folder: Path, server: str | None = None, worker: str | None = None) -> Path:
    """A folder with both programs; working ones by default."""
    folder.mkdir(parents=True)
    for name, text in (("llama-server", server or server_script()), ("ggml-rpc-server", worker or worker_script())):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "libggml-base.so.0.1").write_bytes(b"a library")
    (folder / "libggml-base.so").symlink_to("libggml-base.so.0.1")
    return folder


def tar_of(folder: Path, top: str) -> bytes:
    """A `.tar.gz` of a folder, as release archives are."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        tar.add(folder, arcname=top)
    return out.getvalue()


def tar_with(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_with(*members: tuple[str, bytes, int]) -> bytes:
    """A `.zip` of (name, content, Unix mode)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, data)
    return out.getvalue()


def sdist(**files: str) -> bytes:
    """A source distribution `standin-1.0.0` whose folder `llama.cpp` has these files (`__` in names is a dot)."""
    members = [(tarfile.TarInfo("standin-1.0.0/PKG-INFO"), b"Name: standin\n")]
    for name, text in files.items():
        members.append((tarfile.TarInfo("standin-1.0.0/llama.cpp/" + name.replace("__", ".")), text.encode()))
    return tar_with(*members)

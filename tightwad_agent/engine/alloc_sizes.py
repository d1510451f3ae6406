"""What a worker said that a tensor takes of its memory, remembered by the coordinator's end of its tunnel.

Whenever a batch or the context outgrows what was planned for, the engine lays its graph out anew, and asks the worker
of each attention layer how much memory its result needs (GET_ALLOC_SIZE): a round trip each, one after the other. The
answer depends on shapes and types alone, so one answer serves all layers, and every later request.

    request   u32 device | tensor | 10 tensors that it is made of       a tensor: 296 bytes
    answer    u64 8 | u64 bytes
"""

from __future__ import annotations

import struct
from hashlib import sha256

GET_ALLOC_SIZE = 13
_TENSOR = 296
_N_TENSORS = 11
_DEVICE = 4
REQUEST_BYTES = _DEVICE + _N_TENSORS * _TENSOR
_CHANGING = ((0, 8), (12, 20), (124, 204), (212, 292))
"""Of a tensor, what may be another each time and does not matter: its number, its buffer, what it is made of, where it
lies, its name. What is no tensor is all zeros, and a tensor has dimensions."""
_VIEWED = slice(204, 212)
"""The tensor that it is a view of: only whether there is one matters."""
_ANSWER = struct.Struct("<QQ")
MAX_ANSWERS = 4096
_MAX_SIZE = 1 << 48
_BUFFER = slice(_DEVICE + 12, _DEVICE + 20)

Key = bytes


class AllocSizes:
    """Of one worker, for as long as its process runs; for all its connections."""

    def __init__(self) -> None:
        self._known: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._known)

    def answer(self, key: Key) -> bytes | None:
        """What the worker would answer, if it did before."""
        size = self._known.get(key)
        return None if size is None else _ANSWER.pack(8, size)

    def learn(self, key: Key, size: int) -> None:
        """When there are too many, all are forgotten."""
        if len(self._known) >= MAX_ANSWERS:
            self._known = {}
        self._known[key] = size


class Asked:
    """The question that one connection waits to be answered."""

    def __init__(self, sizes: AllocSizes) -> None:
        self._sizes = sizes
        self._key: Key | None = None
        self._came = bytearray()

    def known(self, request: bytes) -> bytes | None:
        """The answer to a request of `REQUEST_BYTES`; None if it has to be asked, and will be answered next."""
        key = key_of(request)
        found = self._sizes.answer(key)
        self._key = key if found is None else None
        self._came = bytearray()
        return found

    def heard(self, data: bytes | bytearray | memoryview) -> None:
        """This came from the worker. What is not the answer of such a question is not learnt from."""
        if self._key is None:
            return
        self._came += data[: _ANSWER.size + 1 - len(self._came)]
        if len(self._came) < _ANSWER.size:
            return
        key, self._key = self._key, None
        if len(self._came) == _ANSWER.size:
            n_payload, size = _ANSWER.unpack(self._came)
            if n_payload == 8 and size < _MAX_SIZE:
                self._sizes.learn(key, size)


def key_of(request: bytes) -> Key:
    """What the answer depends on. A result that has a buffer already is asked about in that one."""
    plain = bytearray(request)
    for at in range(_DEVICE, REQUEST_BYTES, _TENSOR):
        for start, end in _CHANGING:
            plain[at + start : at + end] = bytes(end - start)
        viewed = slice(at + _VIEWED.start, at + _VIEWED.stop)
        plain[viewed] = any(plain[viewed]).to_bytes(8, "little")
    plain[_BUFFER] = request[_BUFFER]
    return sha256(plain).digest()

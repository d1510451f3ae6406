"""A join token given on the command line must not stay there: everyone on the machine can read `ps`.

The process replaces itself with the same command in which the token is `fd:N`, a pipe that holds it. The token is then
visible for the milliseconds until the replacement, not for the life of the agent. Where a process cannot be replaced
(Windows), the token stays; `-` reads it from standard input everywhere.
"""

import os
import sys

PREFIX = "tw1"
MAX_TOKEN = 4096
OPTION = "--join"
COMMAND = "join"


def from_argv(argv: list[str]) -> list[str]:
    """The arguments with `fd:N` resolved; does not return where a token had to be hidden first."""
    parts = [_split(argv, i) for i in range(len(argv))]
    resolved = [head + _read(value) if value.startswith("fd:") else arg for arg, (head, value) in _zip(argv, parts)]
    if resolved != argv:
        return resolved
    if not any(_is_token(value) for _, value in parts) or not _replaceable(argv):
        return argv
    hidden = [head + _pipe(value) if _is_token(value) else arg for arg, (head, value) in _zip(argv, parts)]
    interpreter = sys.orig_argv[1 : len(sys.orig_argv) - len(argv)]
    return os.execv(sys.executable, [sys.executable, *interpreter, *hidden])  # noqa: S606 - the same program, not a shell


def _zip(argv: list[str], parts: list[tuple[str, str]]) -> list[tuple[str, tuple[str, str]]]:
    return list(zip(argv, parts, strict=True))


def _split(argv: list[str], i: int) -> tuple[str, str]:
    """What stands before the token in argument `i`, and the token; two empty texts where no token is expected."""
    head, equals, value = argv[i].partition("=")
    if head == OPTION and equals:
        return head + equals, value
    if i > 0 and (argv[i - 1] == OPTION or COMMAND in argv[:i]):
        return "", argv[i]
    return "", ""


def _replaceable(argv: list[str]) -> bool:
    return os.name == "posix" and bool(sys.executable) and sys.orig_argv[-len(argv) :] == argv


def _is_token(text: str) -> bool:
    return text.startswith(PREFIX) and len(text) > 64


def _pipe(token: str) -> str:
    reader, writer = os.pipe()
    os.write(writer, os.fsencode(token)[:MAX_TOKEN])
    os.close(writer)
    os.set_inheritable(reader, True)
    return f"fd:{reader}"


def _read(arg: str) -> str:
    number = arg[3:]
    if not number.isascii() or not number.isdecimal() or not 3 <= int(number[:9]) < 1 << 20:
        return arg  # the standard streams are not ours to close
    try:
        with open(int(number), "rb") as pipe:
            return pipe.read(MAX_TOKEN).decode("ascii", "replace").strip()
    except (OSError, OverflowError):
        return arg

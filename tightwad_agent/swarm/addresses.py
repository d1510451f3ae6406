"""Which web addresses may be asked for a file, and which of them other nodes may be told.

Plain http is for loopback. An address with a query may carry a secret or a signature that expires, so only those
without are shared. A model in several files has them beside one another, and one address stands for all.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import SplitResult, urlsplit

from tightwad_agent.errors import UsageError

MAX_ADDRESS = 2_000

_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})(\.gguf)(?=[?#]|\Z)")


def web_address(url: str) -> SplitResult:
    """The parts of an address that may be asked. Raises `UsageError` that says what is wrong with it."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError:
        raise UsageError(f"{url[:200]!r} is no web address") from None
    if not host or parts.scheme not in ("https", "http"):
        raise UsageError(f"{url[:200]!r} is no web address")
    if parts.scheme == "http" and not _is_loopback(host):
        raise UsageError(f"{parts.scheme}://{host} is not encrypted", hint="Use https://.")
    if parts.username is not None or parts.password is not None:
        raise UsageError("an address with a password in it would end up in logs", hint="Leave the password out.")
    return parts


def check_shared(url: str) -> None:
    """Raises `UsageError` unless `url` is an address that other nodes may be told and may ask."""
    if len(url) > MAX_ADDRESS:
        raise UsageError(f"an address of {len(url)} characters, at most {MAX_ADDRESS} are taken")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError("an address with blanks, control or other characters that must be escaped")
    parts = web_address(url)
    if "?" in url or "#" in url:
        raise UsageError(f"the address at {parts.hostname} has a query, which may be secret")


def n_files_at(url: str) -> int:
    """Of how many files that are named by their numbers the address is one; 1 for any other."""
    match = _SPLIT.search(url)
    return int(match[2]) if match else 1


def file_at(url: str, number: int) -> str:
    """The address of another file of the same model, counted from 1."""
    return _SPLIT.sub(lambda match: f"-{number:05d}-of-{match[2]}{match[3]}", url, count=1)


def may_be_shared(url: str) -> bool:
    try:
        check_shared(url)
    except UsageError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

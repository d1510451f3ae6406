"""What a Python package index and pip's configuration say, as values: parsers only, nothing is fetched here.

Index pages are PEP 691 JSON or PEP 503 HTML. pip's configuration is what `pip config list` prints.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any, Literal
from urllib.parse import urldefrag, urljoin, urlsplit

from tightwad_agent.errors import OriginError

JSON_PAGE = "application/vnd.pypi.simple.v1+json"
ACCEPT = f"{JSON_PAGE}, application/vnd.pypi.simple.v1+html;q=0.5, text/html;q=0.1"
MAX_PAGE_BYTES = 64 << 20
"""The longest project pages hold some ten thousand files and take about 20 MB."""
MAX_FILES = 200_000

Kind = Literal["wheel", "sdist"]

_PROJECT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?\Z")
_HEX_64 = re.compile(r"[0-9a-fA-F]{64}\Z")
_FINAL = re.compile(r"v?(?:(\d+)!)?(\d+(?:\.\d+)*)(?:\.?post(\d+))?\Z", re.IGNORECASE)
_SDIST_SUFFIXES = (".tar.gz", ".zip")


@dataclass(frozen=True, slots=True)
class IndexFile:
    """One file of a package index. `sha256` in hex, empty where the index gives none; `size` in bytes where known.

    `cert` and `trusted_hosts` are what pip is configured with, to be handed on to the download.
    """

    filename: str
    url: str
    sha256: str
    size: int | None = None
    cert: str = ""
    trusted_hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """Where pip looks for packages: page addresses, first the main one; the CA bundle; hosts that may be plain http."""

    indexes: tuple[str, ...]
    cert: str = ""
    trusted_hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listed:
    """A file as a page lists it."""

    file: IndexFile
    yanked: bool


def normalised(package: str) -> str:
    """The name as it stands in index addresses (PEP 503). `OriginError` if it is no package name."""
    if _PROJECT.match(package) is None:
        raise OriginError(f"{package[:100]!r} is no name of a Python package")
    return re.sub(r"[-_.]+", "-", package).lower()


def config_from_list(text: str, environ: Mapping[str, str], default_index: str) -> IndexConfig:
    """The index configuration from the output of `pip config list`.

    pip's own order: environment, then the section of the command, then `global`. uv's variables come between the
    environment of pip and its files, because somebody set them for this very process.
    """
    values: dict[str, str] = {}
    for line in text.splitlines():
        name, eq, quoted = line.strip().partition("=")
        if not eq:
            continue
        try:
            value = ast.literal_eval(quoted)
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, str):
            values[name] = value

    def setting(key: str) -> str:
        for section in (":env:", "download", "install", "global"):
            if value := values.get(f"{section}.{key}", "").strip():
                return value
        return ""

    if setting("no-index").lower() in ("1", "true", "yes", "on") and not environ.get("UV_INDEX_URL"):
        raise OriginError("pip is configured with no-index, so there is no package index to ask")
    from_uv = environ.get("UV_DEFAULT_INDEX", "").strip() or environ.get("UV_INDEX_URL", "").strip()
    main = values.get(":env:.index-url", "").strip() or from_uv or setting("index-url") or default_index
    extra = [url for url in setting("extra-index-url").split() if url.startswith(("https://", "http://"))]
    return IndexConfig((main, *extra), setting("cert"), tuple(setting("trusted-host").split()))


def page_url(index: str, package: str) -> str:
    """Address of the page that lists a package's files."""
    return f"{index.rstrip('/')}/{normalised(package)}/"


def parse_page(url: str, content_type: str, body: bytes) -> list[Listed]:
    """The files on a page that came from `url`. `OriginError` if it is neither PEP 691 JSON nor HTML."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind in (JSON_PAGE, "application/json"):
        return _parse_json(url, body)
    parser = _Links()
    parser.feed(body.decode("utf-8", "replace"))
    parser.close()
    found = (_from_link(url, href, name, yanked) for href, name, yanked in parser.links[:MAX_FILES])
    return [entry for entry in found if entry is not None]


def choose(listed: Iterable[Listed], package: str, version: str | None, kind: Kind) -> IndexFile | None:
    """The file of that version, or of the newest final one; None if there is none.

    Among wheels one for every platform is preferred: platform wheels are pip's business.
    """
    wanted = normalised(package)
    best: tuple[tuple[Any, ...], IndexFile] | None = None
    for entry in listed:
        found = _version_in(entry.file.filename, wanted, kind)
        if found is None or (version is not None and found != version) or (version is None and entry.yanked):
            continue
        key = _order(found) if version is None else (0,)
        if key is None:
            continue
        rank = (*key, entry.file.filename.endswith("-none-any.whl"), entry.file.filename.endswith(".tar.gz"))
        if best is None or rank > best[0]:
            best = (rank, entry.file)
    return best[1] if best else None


def _parse_json(url: str, body: bytes) -> list[Listed]:
    try:
        page = json.loads(body)
        files = page["files"]
        return [_from_json(url, entry) for entry in files[:MAX_FILES]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise OriginError(f"{urlsplit(url).hostname}: the package index answered with a damaged page") from None


def _from_json(url: str, entry: dict[str, Any]) -> Listed:
    digest, size = entry.get("hashes", {}).get("sha256", ""), entry.get("size")
    return Listed(
        IndexFile(
            filename=str(entry["filename"]),
            url=urljoin(url, str(entry["url"])),
            sha256=digest.lower() if isinstance(digest, str) and _HEX_64.match(digest) else "",
            size=size if type(size) is int and size >= 0 else None,
        ),
        yanked=bool(entry.get("yanked", False)),
    )


class _Links(HTMLParser):
    """Collects (href, text, yanked) of each `<a>`."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, str, bool]] = []
        self._href: str | None = None
        self._yanked = False
        self._text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            found = dict(attrs)
            self._href, self._yanked, self._text = found.get("href"), "data-yanked" in found, ""

    def handle_data(self, data: str) -> None:
        self._text += data if self._href is not None else ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "a" and self._href is not None:
            self.links.append((self._href, self._text.strip(), self._yanked))
            self._href = None


def _from_link(page: str, href: str, name: str, yanked: bool) -> Listed | None:
    try:
        url, fragment = urldefrag(urljoin(page, href))
    except ValueError:
        return None  # no address
    digest = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
    return Listed(IndexFile(name, url, digest.lower() if _HEX_64.match(digest) else ""), yanked)


def _version_in(filename: str, package: str, kind: Kind) -> str | None:
    """The version in a file's name if the file is of this package and kind."""
    if kind == "wheel":
        parts = filename.removesuffix(".whl").split("-")
        if not filename.endswith(".whl") or len(parts) not in (5, 6):
            return None
        name, version = parts[0], parts[1]
    else:
        suffix = next((s for s in _SDIST_SUFFIXES if filename.endswith(s)), None)
        name, dash, version = filename.removesuffix(suffix or "").rpartition("-")
        if suffix is None or not dash:
            return None
    return version if re.sub(r"[-_.]+", "-", name).lower() == package else None


def _order(version: str) -> tuple[int, tuple[int, ...], int] | None:
    """A sort key for final releases; None for pre-releases and local versions, which nobody gets without asking."""
    match = _FINAL.match(version)
    if match is None or len(version) > 64:
        return None
    release = [int(n) for n in match[2].split(".")]
    while release and release[-1] == 0:
        release.pop()
    return (int(match[1] or 0), tuple(release), int(match[3]) if match[3] else -1)

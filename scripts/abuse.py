"""Join tokens that were changed, in every place where one is read: how many are accepted. It must be none.

Of each twenty: ten are a token's text with characters changed, nine its bytes with the checksum put right again, so
that the signature has to find them, and one is a whole request to join, with which an attacker who holds an expired
token, what was said of a good one, or a token of his own cluster asks the authority's own code for a certificate.
"""

from __future__ import annotations

import argparse
import base64
import logging
import multiprocessing
import random
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tightwad_agent.errors import TokenError
from tightwad_agent.ids import NodeName
from tightwad_agent.mesh import certs, identity, tokens
from tightwad_agent.mesh.enrol import Registrar
from tightwad_agent.mesh.ledger import Ledger
from tightwad_agent.mesh.tokens import Token
from tightwad_agent.wire.handshake import Joined, JoinRequest
from tightwad_agent.wire.rows import Role

NOW = 1_800_000_000.0
DIGEST, NONCE = b"d" * 32, b"n" * 32
MAX_CHANGES = 4


@dataclass
class Office:
    """An authority with a good token, and what an attacker may have: an old token, and a cluster of his own."""

    registrar: Registrar
    ledger: Ledger
    good: Token
    stale: Token
    foreign: Token
    node_key: Ed25519PrivateKey


def office(folder: Path) -> Office:
    """Made anew in this directory."""
    mine = identity.create_cluster(folder / "mine", NodeName("a"), NOW)
    his = identity.create_cluster(folder / "his", NodeName("m"), NOW)
    book = Ledger(mine.state_dir)
    registrar = Registrar(who=lambda: mine, ledger=book, clock=lambda: NOW)
    return Office(
        registrar,
        book,
        identity.issue_token(mine, book, NOW, uses=1000),
        identity.issue_token(mine, book, NOW - 7200, ttl_s=3600),
        identity.issue_token(his, Ledger(his.state_dir), NOW, uses=1000, role=Role.AUTHORITY),
        certs.new_key(),
    )


def changed(data: bytes, dice: random.Random) -> bytes:
    """One to four bytes replaced, taken out or put in; never the same as before."""
    while True:
        new = bytearray(data)
        for _ in range(dice.randint(1, MAX_CHANGES)):
            match dice.randrange(3):
                case 0 if new:
                    new[dice.randrange(len(new))] = dice.randrange(256)
                case 1 if new:
                    del new[dice.randrange(len(new))]
                case _:
                    new.insert(dice.randrange(len(new) + 1), dice.randrange(256))
        if bytes(new) != data:
            return bytes(new)


def replaced(data: bytes, dice: random.Random) -> bytes:
    """One byte is another."""
    at = dice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ dice.randrange(1, 256)]) + data[at + 1 :]


def mutated_text(where: Office, dice: random.Random) -> str:
    """Why the text was refused; empty if it was accepted."""
    text = changed(where.good.text.encode(), dice).decode("latin-1")
    if "".join(text.split()) == where.good.text:
        return "only white space differs"
    return _parsed(text)


def mutated_body(where: Office, dice: random.Random) -> str:
    """The same for bytes whose checksum is right."""
    good = where.good
    body = changed(good.ca_public + good.seed + good.ca_signature + good.claims_bytes, dice)
    body += zlib.crc32(body).to_bytes(4, "big")
    return _parsed(tokens.PREFIX + base64.urlsafe_b64encode(body).decode().rstrip("="))


def _parsed(text: str) -> str:
    try:
        tokens.parse(text)
    except TokenError as exc:
        return exc.message.split(":")[0][:60]
    return ""


async def forged_request(where: Office, dice: random.Random) -> str:
    """A request as an attacker would put it together; all that he can sign, he signs."""
    claims, ca_signature, seed = where.good.claims_bytes, where.good.ca_signature, where.good.seed
    match dice.randrange(6):
        case 0:  # other claims: more uses, another role
            claims = changed(claims, dice)
        case 1:
            ca_signature = replaced(ca_signature, dice)
        case 2:  # he saw the token's claims, but has not its key
            seed = dice.randbytes(32)
        case 3:
            claims, ca_signature, seed = where.stale.claims_bytes, where.stale.ca_signature, where.stale.seed
        case 4:  # his own cluster's
            claims, ca_signature, seed = where.foreign.claims_bytes, where.foreign.ca_signature, where.foreign.seed
        case _:  # the good token's id and key, what his own cluster says of it
            claims = where.foreign.claims_bytes.replace(where.foreign.claims.token_id, where.good.claims.token_id)
            ca_signature = where.foreign.ca_signature
    node = where.node_key
    spki = certs.spki(node.public_key())
    text = tokens.join_text(nonce=NONCE, leaf_digest=DIGEST, spki=spki, claims=claims)
    proof = Ed25519PrivateKey.from_private_bytes(seed).sign(text)
    request = JoinRequest(claims, ca_signature, spki, proof, node.sign(text), NodeName("mallory"))
    answer = await where.registrar._answer(where.registrar.who(), where.ledger, request, text)
    return "" if isinstance(answer, Joined) else f"request: {answer.code}"


async def honest_request(where: Office) -> bool:
    """That the same way leads in with a good token: a check that refuses all is no check."""
    good, node = where.good, certs.new_key()
    spki = certs.spki(node.public_key())
    text = tokens.join_text(nonce=NONCE, leaf_digest=DIGEST, spki=spki, claims=good.claims_bytes)
    proof = Ed25519PrivateKey.from_private_bytes(good.seed).sign(text)
    request = JoinRequest(good.claims_bytes, good.ca_signature, spki, proof, node.sign(text), NodeName("friend"))
    return isinstance(await where.registrar._answer(where.registrar.who(), where.ledger, request, text), Joined)


async def attack(n: int, seed: int, folder: Path) -> Counter[str]:
    """What became of `n` attempts, by reason; `accepted` must not be among them."""
    where, dice = office(folder), random.Random(seed)
    ways: tuple[Callable[[Office, random.Random], str], ...] = (mutated_text, mutated_body)
    found: Counter[str] = Counter()
    for i in range(n):
        if i % 20 < 19:
            reason = ways[i % 2](where, dice)
        else:
            reason = await forged_request(where, dice)
        found[reason or "accepted"] += 1
    if not await honest_request(where):
        raise RuntimeError("a good token is refused: nothing was tested")
    return found


def _share(job: tuple[int, int]) -> Counter[str]:
    logging.disable()
    n, seed = job
    with tempfile.TemporaryDirectory(prefix="tightwad-abuse-") as folder:
        return trio.run(attack, n, seed, Path(folder))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/abuse", description=__doc__)
    parser.add_argument("--mutants", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    began, slices = time.monotonic(), max(1, args.mutants // 10_000)
    jobs = [(args.mutants // slices + (i < args.mutants % slices), args.seed * 1_000_003 + i) for i in range(slices)]
    found: Counter[str] = Counter()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for part in pool.imap_unordered(_share, jobs):
            found += part
            print(f"{found.total():>9}  tried, {found['accepted']} accepted", flush=True)
    for reason, n in found.most_common():
        print(f"{n:>9}  {reason}")
    took_s = time.monotonic() - began
    print(f"{found.total()} changed tokens, {found['accepted']} accepted, {took_s:.0f} s, seed {args.seed}")
    return 1 if found["accepted"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Joining: how a machine with a token becomes a node, both sides.

The joiner trusts nothing but the CA key in its token. It signs (nonce, the leaf that this connection showed, its own
key, the claims) with the token's key and with its own, and sends no secret. The authority writes (token, node) down
before it issues. A machine in between has another leaf, so what it relays does not verify; with a CA of its own it is
named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tightwad_agent import __version__
from tightwad_agent.errors import (
    EnvironmentFault,
    NotTrusted,
    OutOfDate,
    PeerError,
    PeerRefused,
    ProtocolError,
    TokenError,
    UsageError,
)
from tightwad_agent.ids import Address, ClusterId, NodeId, NodeName
from tightwad_agent.mesh import certs, clocks, identity, lineage, tls, tokens
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.ledger import Ledger
from tightwad_agent.mesh.links import JOIN_SERVICE, Visitor, ask, exchange
from tightwad_agent.mesh.race import MAX_TRIED, Race, defeat
from tightwad_agent.mesh.state import NodeState, is_api_key
from tightwad_agent.mesh.tokens import Token, Verdict
from tightwad_agent.streams import Framed, close_quietly
from tightwad_agent.wire.handshake import (
    JOIN,
    LINK,
    LINK_VERSION_MAX,
    LINK_VERSION_MIN,
    MAX_JOIN_ADDRESSES,
    MAX_JOIN_MEMBERS,
    MAX_OPENING,
    MAX_PEER_ADDRESSES,
    MAX_STRANGER_OPENING,
    NONCE_BYTES,
    Challenge,
    Hello,
    History,
    Joined,
    JoinRefused,
    JoinRequest,
    Line,
    Open,
    RememberedPeer,
)
from tightwad_agent.wire.rows import Role
from tightwad_agent.wire.trust import Succession

log = logging.getLogger(__name__)

STAGGER_S = 0.25
JOIN_DEADLINE_S = 30.0
NOT_AUTHORITY = "not_authority"
FORGED = "forged"
DENIED = "denied"
REVOKED = "revoked"
FAULT = "fault"
_GO_ON = (NOT_AUTHORITY, Verdict.UNKNOWN.value, FAULT)
"""Refusals after which another authority may still say yes."""


# The authority


@dataclass(frozen=True, slots=True, kw_only=True)
class Registrar:
    """A member's side of joining: an authority enrols, any other says who does. `serve` is a `links.JoinHandler`.

    `who` is this node as it is now (leafs are renewed), `ledger` None on a node that is no authority. `clock` gives
    Unix seconds. `members`: nodes that the new one should remember. `authorities`: addresses to send a joiner on to.
    `on_joined` hears of each node admitted, also of a repeated one.
    """

    who: Callable[[], Identity]
    ledger: Ledger | None
    clock: Callable[[], float]
    members: Callable[[], Sequence[RememberedPeer]] = lambda: ()
    authorities: Callable[[], Sequence[Address]] = lambda: ()
    is_denied: Callable[[NodeId], bool] = lambda _node: False
    is_revoked: Callable[[bytes], bool] = lambda _token_id: False
    on_joined: Callable[[NodeId, NodeName, Role], None] = lambda _node, _name, _role: None

    async def serve(self, visitor: Visitor, stream: trio.abc.Stream) -> None:
        """One conversation. Raises a `PeerError` if the joiner breaks off; says no in a message, not by an error."""
        me = self.who()
        framed = Framed(stream, JOIN, max_header=MAX_STRANGER_OPENING)
        nonce = secrets.token_bytes(NONCE_BYTES)
        if me.lineage and visitor.hello.knows_trust:
            await framed.send(History(me.lineage))
        await framed.send(Challenge(certs.der(me.ca), nonce))
        if me.ca_key is None or self.ledger is None:
            await framed.send(self._no(NOT_AUTHORITY, "this node is not an authority"))
            return
        request: JoinRequest = await framed.expect(JoinRequest)
        digest = hashlib.sha256(visitor.leaf_der).digest()
        text = tokens.join_text(nonce=nonce, leaf_digest=digest, spki=request.spki, claims=request.claims)
        answer = await self._answer(me, self.ledger, request, text)
        if isinstance(answer, JoinRefused):
            log.info("join from %s refused: %s", visitor.remote.host, answer.reason)
        await framed.send(answer)

    async def _answer(self, me: Identity, ledger: Ledger, request: JoinRequest, text: bytes) -> Joined | JoinRefused:
        """`text` is what the joiner must have signed."""
        try:
            claims = tokens.parse_claims(request.claims)
            node_key = certs.key_of_spki(request.spki)
        except (TokenError, NotTrusted) as exc:
            return self._no(FORGED, exc.message)
        node = NodeId.of_spki(request.spki)
        try:
            entry = await trio.to_thread.run_sync(ledger.find, claims.token_id)
            if entry is None:
                return self._no(Verdict.UNKNOWN.value, Verdict.UNKNOWN.reason)
            if complaint := _complaint(request, entry.public_key, me.trusted_keys(self.clock()), text):
                return self._no(FORGED, complaint)
            if self.is_revoked(claims.token_id):
                return self._no(REVOKED, "the join token was revoked")
            if self.is_denied(node):
                return self._no(DENIED, "this node was removed from the cluster")
            verdict = await trio.to_thread.run_sync(ledger.admit, claims.token_id, node, self.clock())
        except EnvironmentFault as exc:
            log.error("no node can join: %s", exc.message)  # noqa: TRY400 - the message says it all
            return self._no(FAULT, "the authority cannot write to its disk")
        if not verdict.is_yes:
            return self._no(verdict.value, verdict.reason)
        log.info("%s (%s) joined with token %s", request.name, node.short, claims.token_id.hex())
        self.on_joined(node, request.name, entry.role)
        return self._welcome(me, node_key, entry.role)

    def _welcome(self, me: Identity, node_key: Ed25519PublicKey, role: Role) -> Joined:
        ca_key = me.ca_key
        assert ca_key is not None
        now = self.clock()
        members = tuple(self.members())[:MAX_JOIN_MEMBERS]
        return Joined(
            certs.der(certs.issue_leaf(me.ca, ca_key, node_key, role, now)),
            me.state.api_key,
            me.state.cluster_name,
            int(now),
            tuple(dataclasses.replace(m, addresses=m.addresses[:MAX_PEER_ADDRESSES]) for m in members),
            certs.raw_private(ca_key) if role is Role.AUTHORITY else b"",
        )

    def _no(self, code: str, reason: str) -> JoinRefused:
        return JoinRefused(code, Line.cleaned(reason), tuple(self.authorities())[:MAX_JOIN_ADDRESSES])


def _complaint(request: JoinRequest, token_public: bytes, ca_keys: Collection[bytes], text: bytes) -> str:
    """What is wrong with the proofs; empty if all hold. `ca_keys`: raw public keys that count now."""
    if not any(tokens.is_signed(ca, token_public, request.claims, request.ca_signature) for ca in ca_keys):
        return "the token's claims are not signed by the cluster, or by a key that it has given up"
    if not tokens.verifies(token_public, request.token_signature, text):
        return "the proof of the token does not hold"
    if not tokens.verifies(request.spki[-32:], request.node_signature, text):
        return "the proof of the node's key does not hold"
    return ""


# The joiner


class _Desk(trio.abc.AsyncResource):
    """A connection to a member of the pinned cluster that has shown its challenge."""

    def __init__(
        self,
        framed: Framed,
        challenge: Challenge,
        leaf_der: bytes,
        member: RememberedPeer,
        steps: tuple[Succession, ...],
    ) -> None:
        self.framed = framed
        self.steps = steps
        self.nonce = challenge.nonce
        self.leaf_digest = hashlib.sha256(leaf_der).digest()
        self.ca = certs.parse_der(challenge.ca_cert)
        self.member = member

    async def aclose(self) -> None:
        await self.framed.stream.aclose()


class _Sent(PeerError):
    """This member enrols nobody, but says who may."""

    def __init__(self, refusal: JoinRefused) -> None:
        super().__init__(str(refusal.reason))
        self.addresses = refusal.addresses


async def join(
    token: Token,
    addresses: Sequence[Address],
    *,
    name: NodeName,
    state_dir: Path,
    clock: Callable[[], float],
    deadline_s: float = JOIN_DEADLINE_S,
) -> Identity:
    """Enrols this machine and writes its identity; at once if it is a member of that cluster already.

    Addresses of the token come first, then the given ones, then those that members name. Raises `TokenError` (refused
    by the authority, says why), `UsageError` (member of another cluster), `NotTrusted` or `PeerUnreachable` (each
    address and why), `StateDamaged`, `EnvironmentFault`. Safe to call again after any of them, or after a crash.
    """
    now = clock()
    known = await trio.to_thread.run_sync(identity.load, state_dir)
    if known is not None and known.cluster != token.cluster:
        raise UsageError(
            f"this machine is a member of cluster {known.cluster.short}, the token is of {token.cluster.short}",
            hint="to change over: tightwad-agent leave",
        )
    if known is not None and known.leaf_expires > now:
        return known
    key = known.key if known is not None else await trio.to_thread.run_sync(identity.begin, state_dir)
    candidates = [*token.claims.addresses, *addresses]
    joiner = _Joiner(token=token, key=key, name=name, state_dir=state_dir, clock=clock, known=known)
    return await joiner.run(candidates, deadline_s)


class _Joiner:
    def __init__(
        self,
        *,
        token: Token,
        key: Ed25519PrivateKey,
        name: NodeName,
        state_dir: Path,
        clock: Callable[[], float],
        known: Identity | None,
    ) -> None:
        self._token = token
        self._key = key
        self._spki = certs.spki(key.public_key())
        self._name = name
        self._state_dir = state_dir
        self._clock = clock
        self._known = known
        self._context = tls.stranger_context()

    async def run(self, candidates: Sequence[Address], deadline_s: float) -> Identity:
        """Asks one authority after another until one says yes or no."""
        ends_at = trio.current_time() + deadline_s
        todo = list(dict.fromkeys(candidates))
        failures: dict[Address, PeerError] = {}
        while todo and len(failures) < MAX_TRIED:
            race = Race(self._approach, stagger_s=STAGGER_S)
            won = await race.run(todo, deadline_s=max(0.0, ends_at - trio.current_time()))
            failures |= race.failures
            if won is not None:
                address, desk = won
                try:
                    return await self._enrol(desk, ends_at)
                except PeerError as exc:
                    failures[address] = exc
                finally:
                    await close_quietly(desk)
            named = [a for exc in failures.values() if isinstance(exc, _Sent) for a in exc.addresses]
            todo = [a for a in dict.fromkeys([*todo, *named]) if a not in failures]
        raise defeat(f"cluster {self._token.cluster.short} was not joined", _without_sent(failures))

    async def _approach(self, address: Address) -> _Desk:
        """Up to a challenge of a member that the pinned key vouches for. Nothing secret is sent, before or after."""
        stream = await tls.connect(address, self._context)
        try:
            link = Framed(stream, LINK, max_header=MAX_STRANGER_OPENING)
            theirs = await exchange(link, self._hello())
            if theirs.cluster != self._token.cluster:
                raise NotTrusted("another cluster answers there")  # noqa: TRY301 - closed in one place
            await ask(link, Open(JOIN_SERVICE), theirs.name, deadline_s=JOIN_DEADLINE_S)
            framed = Framed(link.detach(), JOIN, max_header=MAX_OPENING)
            steps, challenge = await _introduction(framed)
            leaf_der = stream.peer_der() or b""
            try:
                member, role = self._vouched(challenge, leaf_der, theirs.name, address, steps)
            except OutOfDate as exc:
                raise clocks.worded(exc, self._clock(), theirs) from None
            if role is not Role.AUTHORITY:
                raise _Sent(await framed.expect(JoinRefused))  # noqa: TRY301
            return _Desk(framed, challenge, leaf_der, member, steps)
        except BaseException:
            await close_quietly(stream)
            raise

    def _vouched(
        self,
        challenge: Challenge,
        leaf_der: bytes,
        name: NodeName,
        address: Address,
        steps: tuple[Succession, ...],
    ) -> tuple[RememberedPeer, Role]:
        """Who answers, if the pinned key, or one that it led to, signed for it. Raises `NotTrusted`."""
        try:
            ca, leaf = certs.parse_der(challenge.ca_cert), certs.parse_der(leaf_der)
            self._check_ca(ca, steps)
            known = lineage.everyone(steps, ca)
            certs.check_leaf(leaf, lineage.issuer_of(leaf, known) or ca, self._clock())
            role = certs.role_of(leaf)
        except NotTrusted as exc:
            raise type(exc)(
                f"somebody who is not of the token's cluster answers there: {exc.message}", hint=exc.hint
            ) from None
        if len(challenge.nonce) != NONCE_BYTES:
            raise ProtocolError("join: a nonce of the wrong length")
        return RememberedPeer(certs.node_of(leaf), name, (address,)), role

    def _check_ca(self, ca: x509.Certificate, steps: tuple[Succession, ...]) -> None:
        """It is the pinned one, or the newest of a line in which the pinned one stands. Raises `NotTrusted`."""
        if not steps:
            certs.check_ca(ca, self._token.ca_public)
            return
        lineage.check(steps)
        keys = [certs.raw_public(certs.public_of(one)) for one in lineage.everyone(steps, ca)]
        certs.check_ca(ca, keys[0])
        if self._token.ca_public not in keys or lineage.cluster_of(steps, ca) != self._token.cluster:
            raise NotTrusted("it presents another cluster's key")

    async def _enrol(self, desk: _Desk, ends_at: float) -> Identity:
        token, left_s = self._token, max(0.0, ends_at - trio.current_time())
        proof = {"nonce": desk.nonce, "leaf_digest": desk.leaf_digest, "spki": self._spki}
        request = JoinRequest(
            token.claims_bytes,
            token.ca_signature,
            self._spki,
            token.sign_join(**proof),
            self._key.sign(tokens.join_text(**proof, claims=token.claims_bytes)),
            self._name,
        )
        await desk.framed.send(request, deadline_s=left_s)
        answer, _ = await desk.framed.receive(deadline_s=left_s)
        if isinstance(answer, JoinRefused):
            raise _refusal(answer)
        if not isinstance(answer, Joined):
            raise ProtocolError(f"join: expected an answer, got {type(answer).__name__}")
        leaf, ca_key = self._checked(answer, desk.ca)
        made = identity.assemble(
            state_dir=self._state_dir,
            key=self._key,
            leaf=leaf,
            ca=desk.ca,
            ca_key=ca_key,
            state=self._state(answer, desk.member),
            steps=desk.steps,
        )
        return await trio.to_thread.run_sync(identity.commit, made)

    def _checked(self, answer: Joined, ca: x509.Certificate) -> tuple[x509.Certificate, Ed25519PrivateKey | None]:
        """The authority is trusted, its program may still be wrong: nothing that does not fit is kept."""
        leaf, role = certs.parse_der(answer.leaf), self._token.claims.role
        certs.check_leaf(leaf, ca, self._clock())
        if certs.spki(certs.public_of(leaf)) != self._spki or certs.role_of(leaf) is not role:
            raise ProtocolError("join: the certificate is for another node or role")
        if not is_api_key(answer.api_key):
            raise ProtocolError("join: the endpoint's key has the wrong form")
        if role is not Role.AUTHORITY:
            return leaf, None
        if len(answer.ca_key) != 32:
            raise ProtocolError("join: an authority needs the cluster's key, and it did not come")
        ca_key = Ed25519PrivateKey.from_private_bytes(answer.ca_key)
        if certs.raw_public(ca_key.public_key()) != certs.raw_public(certs.public_of(ca)):
            raise ProtocolError("join: the cluster's key that came is another")
        return leaf, ca_key

    def _state(self, answer: Joined, authority: RememberedPeer) -> NodeState:
        """What a fresh node starts with; a node that enrols anew keeps what it remembers."""
        if self._known is not None:
            state = dataclasses.replace(
                self._known.state, name=self._name, cluster_name=answer.cluster_name, api_key=answer.api_key
            )
        else:
            state = NodeState(
                cluster=self._token.cluster,
                cluster_name=answer.cluster_name,
                node=NodeId.of_spki(self._spki),
                name=self._name,
                joined_at=max(0, answer.joined_at),
                api_key=answer.api_key,
            )
        for peer in (*reversed(answer.members), authority):  # the authority, at the address that worked, comes first
            if peer.node != state.node:
                state = state.remembering(peer)
        return state

    def _hello(self) -> Hello:
        now = int(max(0.0, self._clock()))
        return hello_of(self._token.cluster, self._spki, self._name, self._token.claims.role, clock_s=now)


async def _introduction(framed: Framed) -> tuple[tuple[Succession, ...], Challenge]:
    """How the cluster's key changed, if it did, and the challenge."""
    first, _ = await framed.receive()
    if isinstance(first, History):
        return first.lineage, await framed.expect(Challenge)
    if not isinstance(first, Challenge):
        raise ProtocolError(f"join: expected a challenge, got {type(first).__name__}")
    return (), first


def hello_of(
    cluster: ClusterId, spki: bytes, name: NodeName, role: Role, incarnation: int = 0, *, clock_s: int = 0
) -> Hello:
    """This program's `Hello`; `clock_s` as there."""
    return Hello(
        LINK_VERSION_MIN,
        LINK_VERSION_MAX,
        NodeId.of_spki(spki),
        name,
        role,
        cluster,
        incarnation,
        Line.cleaned(f"tightwad-agent/{__version__}"),
        clock_s,
    )


_ANEW = "it may come back as a new one: tightwad-agent leave here, then join with a new token"


def _refusal(answer: JoinRefused) -> Exception:
    if answer.code in _GO_ON:
        return _Sent(answer)
    hint = _ANEW if answer.code == DENIED else "make a new one there: tightwad-agent token create"
    return TokenError(f"the cluster refused the join token: {answer.reason}", hint=hint)


def _without_sent(failures: dict[Address, PeerError]) -> dict[Address, PeerError]:
    """For people: a member that sends on is one that refused."""
    return {a: PeerRefused(e.message) if isinstance(e, _Sent) else e for a, e in failures.items()}

"""The deny list on the disk: it comes back, is private, and damage is named."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from tightwad_agent.errors import StateDamaged
from tightwad_agent.ids import NodeName
from tightwad_agent.mesh import deny, identity
from tightwad_agent.mesh.deny_book import DenyBook
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.testing import node_id
from tightwad_agent.wire.codec import pack, to_plain
from tightwad_agent.wire.trust import Denial, Denied

NOW = 1_800_000_000.0
MALLORY = node_id("mallory")


@pytest.fixture
def me(tmp_path: Path) -> Identity:
    return identity.create_cluster(tmp_path / "a", NodeName("a"), NOW)


def denial(me: Identity) -> Denial:
    assert me.ca_key is not None
    return deny.signed(me.ca_key, Denied.NODE, str(MALLORY), since=NOW, until=NOW + 99)


def test_what_was_in_force_is_in_force_again(me: Identity) -> None:
    book = DenyBook(me, NOW)
    assert not book.denies(MALLORY)
    book.merge([denial(me)], me.trusted_keys(NOW), NOW)
    book.save()
    path = me.state_dir / identity.DENY_LIST
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert DenyBook(me, NOW).denies(MALLORY)
    assert not DenyBook(me, NOW + 99).denies(MALLORY), "it is over"
    later = DenyBook(me, NOW)
    later.merge([], me.trusted_keys(NOW), NOW + 99)
    assert len(later.list) == 0


@pytest.mark.parametrize("data", [b"", b"junk", pack([[1, 2]]), pack({})])
def test_damage_is_named(me: Identity, data: bytes) -> None:
    path = me.state_dir / identity.DENY_LIST
    path.write_bytes(data)
    with pytest.raises(StateDamaged, match=identity.DENY_LIST) as caught:
        DenyBook(me, NOW)
    assert "delete it" in caught.value.hint


def test_a_file_that_somebody_else_wrote_is_not_believed(me: Identity) -> None:
    forged = replace(denial(me), subject=str(node_id("bob")))
    (me.state_dir / identity.DENY_LIST).write_bytes(pack(to_plain((forged,))))
    with pytest.raises(StateDamaged, match="did not sign"):
        DenyBook(me, NOW)

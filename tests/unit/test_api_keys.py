"""Which API keys are good, and how what nodes know of them comes together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.api_keys import KEEP_EXPIRED_S, MAX_LIVE, KeyBook, KeyState, digest_of, state_of
from tightwad_agent.errors import UsageError
from tightwad_agent.wire.codec import Mismatch, from_plain, pack, to_plain, unpack
from tightwad_agent.wire.keys import MAX_RECORDS, ApiKey, KeyName

NOW = 1_800_000_000
DEFAULT = "twk_default"


def book(*records: ApiKey) -> KeyBook:
    made = KeyBook(DEFAULT)
    made.merge(records, NOW)
    return made


def record(n: int, **more) -> ApiKey:
    return ApiKey(n.to_bytes(32, "big"), KeyName(f"k{n}"), NOW - 1000 + n, **more)


def test_a_key_is_good_from_its_making_to_its_end() -> None:
    keys = book()
    made = keys.create("phone", digest_of(b"secret"), NOW, NOW + 60)
    assert keys.holder(b"secret", NOW) == "phone"
    assert keys.holder(b"secret", NOW + 59) == "phone"
    assert keys.holder(b"secret", NOW + 60) == ""
    assert keys.holder(b"other", NOW) == ""
    assert [state_of(made, NOW + s) for s in (0, 60)] == [KeyState.VALID, KeyState.EXPIRED]
    assert b"secret" not in repr(keys.records()).encode()


def test_the_first_key_is_good_until_it_is_revoked() -> None:
    keys = book()
    assert keys.holder(DEFAULT.encode(), NOW) == "default"
    assert keys.default_is_good()
    assert [r.name for r in keys.revoke("default", NOW)] == ["default"]
    assert keys.holder(DEFAULT.encode(), NOW) == ""
    assert not keys.default_is_good()
    with pytest.raises(UsageError, match="no API key 'default' is in force"):
        keys.revoke("default", NOW)


def test_revoking_by_name_and_by_id() -> None:
    keys = book()
    keys.create("phone", digest_of(b"1"), NOW)
    keys.create("laptop", digest_of(b"2"), NOW)
    [gone] = keys.revoke("phone", NOW)
    assert (keys.holder(b"1", NOW), keys.holder(b"2", NOW), gone.revoked) == ("", "laptop", NOW)
    keys.revoke(digest_of(b"2").hex()[:8], NOW)
    assert keys.holder(b"2", NOW) == ""
    with pytest.raises(UsageError, match="there are: default"):
        keys.revoke("tablet", NOW)


def test_a_name_is_free_again_once_its_key_is_not_good() -> None:
    keys = book()
    keys.create("phone", digest_of(b"1"), NOW)
    for taken in ("phone", "default"):
        with pytest.raises(UsageError, match="already"):
            keys.create(taken, digest_of(b"2"), NOW)
    keys.revoke("phone", NOW)
    keys.create("phone", digest_of(b"2"), NOW, NOW + 5)
    keys.create("phone", digest_of(b"3"), NOW + 6)
    assert [keys.holder(k, NOW + 6) for k in (b"1", b"2", b"3")] == ["", "", "phone"]


@pytest.mark.parametrize("name", ["", " ", "a b", "a\n", "-x", "ü", "x" * 33, "a/b", "key:x"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="no name for a key"):
        book().create(name, digest_of(b"1"), NOW)
    with pytest.raises(Mismatch):
        from_plain(ApiKey, [bytes(32), name, 0, 0, 0])


def test_two_keys_of_one_name_made_apart_are_revoked_together() -> None:
    here, there = book(), book()
    here.create("phone", digest_of(b"1"), NOW)
    there.create("phone", digest_of(b"2"), NOW)
    here.merge(there.records(), NOW)
    assert (here.holder(b"1", NOW), here.holder(b"2", NOW)) == ("phone", "phone")
    assert len(here.revoke("phone", NOW)) == 2
    there.merge(here.records(), NOW)
    assert (there.holder(b"1", NOW), there.holder(b"2", NOW)) == ("", "")


def test_revoked_wins_over_made_in_any_order() -> None:
    made = record(1)
    gone = replace(made, revoked=NOW)
    for order in ((made, gone), (gone, made), (gone, made, made)):
        assert book(*order).records() == (gone,)


def test_only_news_are_told() -> None:
    keys = book(record(1))
    assert keys.merge([record(1)], NOW) == ()
    assert keys.merge([record(1), record(2)], NOW) == (record(2),)
    assert keys.merge([replace(record(1), revoked=5)], NOW) == (replace(record(1), revoked=5),)
    assert keys.merge([replace(record(3), digest=b"short")], NOW) == ()


def test_what_expired_long_ago_is_forgotten_everywhere() -> None:
    old = record(1, expires=NOW, revoked=NOW)
    keys = book(old)
    assert keys.records() == (old,)
    keys.forget(NOW + KEEP_EXPIRED_S - 1)
    assert keys.records() == (old,)
    keys.forget(NOW + KEEP_EXPIRED_S)
    assert keys.records() == ()
    assert keys.merge([old], NOW + KEEP_EXPIRED_S) == ()


def test_no_more_than_a_hundred_at_one_time() -> None:
    keys = book(*(record(n) for n in range(MAX_LIVE)))
    with pytest.raises(UsageError, match="100 API keys"):
        keys.create("more", digest_of(b"1"), NOW)
    keys.revoke("k7", NOW)
    keys.create("more", digest_of(b"1"), NOW)


def test_records_are_bounded_and_revoked_ones_stay() -> None:
    revoked = [record(n, revoked=NOW) for n in range(1000, 1000 + MAX_RECORDS - 1)]
    keys = book(record(1), *revoked)
    with pytest.raises(UsageError, match="none may be forgotten"):
        keys.create("more", digest_of(b"1"), NOW)
    assert keys.merge([record(2)], NOW) == ()
    assert keys.merge([record(3, revoked=NOW)], NOW) == (record(3, revoked=NOW),)
    assert len(keys.records()) == MAX_RECORDS
    assert all(r.revoked for r in keys.records()), "a good one made room"


def test_who_says_less_of_a_key_is_believed() -> None:
    """Two records of one key that differ (no honest node makes such): the one that ends earlier."""
    one, other = record(1, expires=NOW + 5), replace(record(1), name=KeyName("z"))
    assert book(one, other).records() == book(other, one).records() == (one,)


def test_equal_knowledge_has_an_equal_fingerprint() -> None:
    assert book().fingerprint() == b""
    one, two = book(record(1), record(2)), book(record(2), record(1))
    assert one.fingerprint() == two.fingerprint()
    one.revoke("k1", NOW)
    assert one.fingerprint() != two.fingerprint()


def test_a_record_survives_the_wire() -> None:
    made = record(7, expires=NOW + 5)
    assert from_plain(ApiKey, to_plain(made)) == made
    assert len(made.short) == 8


def test_golden_vector() -> None:
    """As other versions write it."""
    [vector] = json.loads((Path(__file__).parents[1] / "vectors" / "api_keys.json").read_text())
    phone = ApiKey(bytes(range(32)), KeyName("phone"), 1766000000, 1768000000, 0)
    assert pack(to_plain(phone)).hex() == vector["wire"]
    assert from_plain(ApiKey, unpack(bytes.fromhex(vector["wire"]))) == phone


KINDS = [(NOW - 1, 0), (NOW - 5, NOW + 9), (NOW - 5, NOW - 3), (NOW, NOW - KEEP_EXPIRED_S)]
records = st.builds(
    lambda n, revoked: ApiKey(bytes([n]) * 32, KeyName("ab"[n % 2]), *KINDS[n], revoked),
    st.integers(0, len(KINDS) - 1),
    st.sampled_from([0, 0, NOW, NOW + 1]),
)
"""Of one key all records say the same, but for when it was revoked."""


@given(st.lists(records, max_size=8), st.randoms(use_true_random=False), st.integers(0, 8))
def test_order_and_repetition_do_not_matter(all_of_them: list[ApiKey], rng, cut: int) -> None:
    shuffled = [*all_of_them, *all_of_them[:cut]]
    rng.shuffle(shuffled)
    left, right = book(*shuffled[:cut]), book(*shuffled[cut:])
    left.merge(right.records(), NOW)
    right.merge(left.records(), NOW)
    whole = book(*all_of_them)
    assert left.records() == right.records() == whole.records()
    for r in all_of_them:
        if r.revoked and r.expires != NOW - KEEP_EXPIRED_S:
            assert [k.revoked for k in whole.records() if k.digest == r.digest] >= [1], "nothing brings it back"

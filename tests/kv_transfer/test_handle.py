"""Handles: what is refused, and that nothing in them can be changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.handle import Handle, HandleRefused, check_owner, check_reader, sign, verify
from kv_transfer.wire import HANDLE_BYTES_MAX, answer, ask, is_authentic, read_answer, seal, unseal
from protos import kv_pb2

SECRET = b"the cluster's secret"
HANDLE = Handle(
    transfer_id="r1/1/p",
    tenant="acme",
    model="m",
    reader="decode-1",
    owner="prefill-1",
    owner_incarnation="a1b2",
    owner_address="127.0.0.1:1234",
    row=7,
    word=(1 << 62) + 12345,
    tokens=40,
    block_ids=(5, 6, 900),
    layout_digest="d" * 32,
    deadline_ms=1_800_000_000_000,
)


def test_a_handle_survives_the_way_unchanged():
    assert unseal(seal(HANDLE, SECRET), SECRET) == HANDLE


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Handle)])
def test_no_field_can_be_changed(field):
    message = kv_pb2.KvHandle.FromString(seal(HANDLE, SECRET))
    value = getattr(message, field)
    if field == "block_ids":
        message.block_ids[1] += 1
    else:
        setattr(message, field, value + "x" if isinstance(value, str) else value + 1)
    with pytest.raises(HandleRefused, match="MAC is wrong"):
        unseal(message.SerializeToString(), SECRET)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_byte_can_be_changed(data):
    raw = bytearray(seal(HANDLE, SECRET))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        changed = unseal(bytes(raw), SECRET)
    except HandleRefused:
        return
    assert changed == HANDLE, "only an encoding that means the same may pass"


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_garbage_is_refused_not_crashed_on(raw):
    with pytest.raises(HandleRefused):
        unseal(raw, SECRET)


def test_another_clusters_handle_is_refused():
    with pytest.raises(HandleRefused, match="another cluster's secret"):
        unseal(seal(HANDLE, b"other"), SECRET)


def test_a_handle_without_a_mac_is_refused():
    message = kv_pb2.KvHandle.FromString(seal(HANDLE, SECRET))
    message.ClearField("mac")
    with pytest.raises(HandleRefused, match="MAC is wrong"):
        unseal(message, SECRET)


def test_an_endless_handle_is_not_parsed():
    with pytest.raises(HandleRefused, match="at most"):
        unseal(b"\0" * (HANDLE_BYTES_MAX + 1), SECRET)


def test_a_mac_for_one_purpose_is_no_good_for_another():
    assert verify(sign(SECRET, "a", b"x"), SECRET, "a", b"x")
    assert not verify(sign(SECRET, "a", b"x"), SECRET, "b", b"x")
    assert sign(SECRET, "a", b"xy", b"z") != sign(SECRET, "a", b"x", b"yz")


GOOD: dict[str, Any] = {"reader": "decode-1", "model": "m", "layout_digest": "d" * 32, "block_tokens": 16}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reader": "decode-2"}, "made for 'decode-1', this is 'decode-2'"),
        ({"model": "other"}, "for model 'm', this node holds 'other'"),
        ({"layout_digest": "e" * 32}, "layout d+ there, e+ here"),
        ({"block_tokens": 8}, "40 tokens are 5 blocks, the handle names 3"),
    ],
)
def test_a_reader_that_may_not_or_cannot_is_refused_with_the_reason(change, says):
    check_reader(HANDLE, **GOOD)
    with pytest.raises(HandleRefused, match=says):
        check_reader(HANDLE, **(GOOD | change))


def test_a_handle_for_any_reader_is_good_for_each():
    check_reader(dataclasses.replace(HANDLE, reader=""), **(GOOD | {"reader": "decode-9"}))


def test_a_word_that_every_empty_row_shows_is_refused():
    with pytest.raises(HandleRefused, match="no lease word"):
        check_reader(dataclasses.replace(HANDLE, word=0), **GOOD)


def test_a_handle_of_nothing_is_refused():
    with pytest.raises(HandleRefused, match="0 blocks"):
        check_reader(dataclasses.replace(HANDLE, tokens=0, block_ids=()), **GOOD)


def test_only_its_owner_in_this_life_knows_a_handle():
    check_owner(HANDLE, owner="prefill-1", incarnation="a1b2")
    with pytest.raises(HandleRefused, match="this is 'prefill-2'"):
        check_owner(HANDLE, owner="prefill-2", incarnation="a1b2")
    with pytest.raises(HandleRefused, match="of incarnation a1b2, this is c3d4"):
        check_owner(HANDLE, owner="prefill-1", incarnation="c3d4")


def test_two_leases_of_one_transfer_are_staged_under_different_ids():
    again = dataclasses.replace(HANDLE, word=HANDLE.word + 1)
    assert HANDLE.staged_id != again.staged_id


def test_a_meeting_proves_the_secret_both_ways():
    from kv_transfer.segments import ArenaMap
    from kv_transfer.wire import PeerFacts

    facts = PeerFacts(
        name="p",
        incarnation="i",
        model="m",
        layout={"b": "2", "a": "1"},
        arena=ArenaMap(blocks=4, segment_stride=10, block_stride=20, offset=3),
        board_rows=8,
        board_digests_offset=96,
        board_row_bytes=64,
        transports={"y": b"2", "x": b"1"},
    )
    request = ask("d", b"n" * 16, SECRET)
    assert is_authentic(request, SECRET)
    assert not is_authentic(request, b"other")
    message = answer(facts, b"n" * 16, SECRET)
    assert read_answer(message, b"n" * 16, SECRET) == facts
    assert read_answer(message, b"another nonce 12", SECRET) is None
    message.transports["x"] = b"elsewhere"
    assert read_answer(message, b"n" * 16, SECRET) is None

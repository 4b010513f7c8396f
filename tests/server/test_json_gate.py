"""The gate in front of pydantic: it reads what a strict parser reads, and refuses the rest with InvalidRequest."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from uld_serve.errors import InvalidRequest
from uld_serve.server.json_gate import MAX_DEPTH, parse_object

scalars = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text(st.characters(codec="utf-8"))
finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars | finite, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
objects = st.dictionaries(st.text(st.characters(codec="utf-8")), values)


def without_surrogates(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@given(objects.filter(without_surrogates), st.booleans())
@settings(max_examples=80, deadline=None)
def test_what_json_writes_is_read_back(value: dict[str, object], ascii_only: bool) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(
    st.binary(max_size=200) | st.text(alphabet='{}[]",:\\ud8\x00 1e-.NaInfity', max_size=200).map(str.encode)
)
@example(b'{"a": "\\ud800"}')
@settings(max_examples=400, deadline=None)
def test_any_bytes_give_an_object_or_invalid_request(body: bytes) -> None:
    try:
        value = parse_object(body)
    except InvalidRequest:
        return
    # What passed means the same to every strict parser.
    assert json.loads(body) == value
    assert without_surrogates(value)


@given(objects.filter(without_surrogates), st.text(st.characters(codec="utf-8")), values, values)
@settings(max_examples=40, deadline=None)
def test_a_key_given_twice_is_refused_at_any_depth(
    outer: dict[str, object], key: str, first: object, second: object
) -> None:
    twice = f"{{{json.dumps(key)}: {json.dumps(first)}, {json.dumps(key)}: {json.dumps(second)}}}"
    for body in (twice, f'{{"messages": [{twice}]}}'):
        with pytest.raises(InvalidRequest):
            parse_object(body.encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b'{"a": 1,}',
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 12345678901234567890123}',
        b'{"a": "\xff"}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": 1}'.encode("utf-16"),
        '{"a": 1}'.encode("utf-32"),
        b'{"a": "\\ud800"}',
        b'{"a": ["\\udc00\\ud800"]}',
        b'{"\\udfff": 1}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": 1} {"a": 2}',
        b'{"a": "line\nbreak"}',
        b'{"a": 1, "\\u0061": 2}',
    ],
)
def test_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_object(body)


def test_depth_is_bounded_and_brackets_in_strings_do_not_count() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' * depth + b"1" + b"}" * depth

    assert parse_object(nested(MAX_DEPTH))
    with pytest.raises(InvalidRequest, match="deeper"):
        parse_object(nested(MAX_DEPTH + 1))
    with pytest.raises(InvalidRequest, match="deeper"):
        parse_object(b'{"a": ' + b"[" * 1_000_000)
    assert parse_object(b'{"a": "' + b"[{" * 100 + b'\\"[["}') == {"a": "[{" * 100 + '"[['}


def test_surrogate_pairs_and_nul_are_text() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude00\\u0000"}') == {"a": "\U0001f600\x00"}


@pytest.mark.parametrize("unit", [b'"', b'\\"', b"[]", b"{}", b'""', b"\\", b"["])
def test_a_megabyte_of_nonsense_is_refused_fast(unit: bytes) -> None:
    body = b'{"a": "' + unit * (1_000_000 // len(unit))
    started = time.perf_counter()
    with pytest.raises(InvalidRequest):
        parse_object(body)
    assert time.perf_counter() - started < 2.0  # milliseconds each; a quadratic scan takes minutes


def test_duplicate_key_is_named_but_cleaned() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_object('{"é\u2028": 1, "é\u2028": 2}'.encode())
    assert caught.value.param == "??"

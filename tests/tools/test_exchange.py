"""Bodies of errors and JSON that are made to keep the reader busy, or to show half a password."""

import asyncio
import sys

import pytest

from mmsr_jax.tools import exchange
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.body import parse_json, read_body
from mmsr_jax.tools.exchange import MAX_ERROR_BODY, failure


@pytest.mark.parametrize("show", [True, False])
def test_a_long_error_is_not_searched_for_addresses(show, monkeypatch):
    """256 KB of "http://" took 40 seconds, in which no other call went on."""
    searched = []
    monkeypatch.setattr(exchange, "redact", lambda text: searched.append(text) or text)
    error = failure(500, {}, b"http://" * (1 << 15), (), show)
    assert error.kind == "server_error" and len(error.body) == MAX_ERROR_BODY
    assert all(len(text) <= MAX_ERROR_BODY for text in searched)


def test_no_half_of_an_address_is_shown():
    long = b"see https://a.example/?" + b"q" * (MAX_ERROR_BODY - 50)
    for extra in range(60):  # where the cut falls
        body = long + b"q" * extra + b" https://user:password@b.example/ " + b"x" * 9000
        shown = str(failure(500, {}, body, (), True))
        assert "HTTP 500: see https" in shown and "pass" not in shown
    whole = str(failure(400, {}, b"ask https://user:password@b.example/ now", (), True))
    assert whole == "bad_response: HTTP 400: ask https://***@b.example/ now"


def test_deep_json_with_half_a_character():
    # The parser goes so deep, mending does not; from Python 3.12 on that takes one frame a level.
    depth = 700 if sys.version_info < (3, 12) else 1100
    body = b"[" * depth + rb'"\ud800"' + b"]" * depth
    with pytest.raises(ToolError, match="bad_response: the JSON is nested too deeply"):
        parse_json(body, "application/json")


@pytest.mark.parametrize(("size", "good"), [(1, False), (31, False), (32, True)])
def test_a_body_in_crumbs_is_not_read_to_its_end(size, good):
    """Byte by byte, 8 MB kept the event loop busy for all the seconds that a page may take."""
    read = 0

    async def chunks():
        nonlocal read
        for number in range(1, 10_001):
            read = number
            yield b"x" * size

    reading = read_body(chunks(), "", None, 1 << 20)
    if good:
        assert len(asyncio.run(reading)) == size * 10_000
        return
    with pytest.raises(ToolError, match=f"bad_response: {size * 4097} bytes in 4097 chunks"):
        asyncio.run(reading)
    assert read == 4097

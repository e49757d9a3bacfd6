"""The HTTP client against a server that misbehaves, over real loopback sockets."""

import asyncio
import email.utils
import gzip
import logging
import random
import time
import tracemalloc
import zlib

import pytest
from fault_server import FaultServer, always, header, path, reset, response

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.http import Http, HttpConfig, HttpError, HttpRequest
from mmsr_jax.tools.limits import Limits

KEY = "sk-very+secret/key=123"
QUICK = HttpConfig(backoff=0.01, default_limits=Limits(rate=1000, burst=1000))


async def hang(head, reader, writer):
    await asyncio.sleep(60)


async def drip(head, reader, writer):
    """A body that never ends and never pauses for long."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[")
    while True:
        writer.write(b"1,")
        await writer.drain()
        await asyncio.sleep(0.02)


async def slow_head(head, reader, writer):
    writer.write(b"HTTP/1.1 200 OK\r\nX-A: ")
    await hang(head, reader, writer)


async def reset_at_once(head, reader, writer):
    reset(writer)


async def reset_in_the_middle(head, reader, writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 100)
    await writer.drain()
    await asyncio.sleep(0.02)
    reset(writer)


async def end_in_the_middle(head, reader, writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 100)
    writer.close()


async def broken_chunks(head, reader, writer):
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n")
    writer.close()


async def no_http(head, reader, writer):
    writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
    writer.close()


async def endless_head(head, reader, writer):
    writer.write(b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"a" * 500_000)
    await writer.drain()
    await asyncio.sleep(60)


def in_turn(*responses):
    """A handler that gives one answer after another, then the last for ever."""
    left = list(responses)

    async def handler(head, reader, writer):
        writer.write(left.pop(0) if len(left) > 1 else left[0])

    return handler


def ask(handler, config=QUICK, **fields):
    """Sends one request to a server with this handler -> (response or error, server, client)."""

    async def run():
        async with FaultServer(handler) as server, Http(config, rng=random.Random(0)) as http:
            fields.setdefault("method", "GET")
            fields.setdefault("deadline", 10.0)
            request = HttpRequest("p", url=server.url + fields.pop("path", "/"), **fields)
            try:
                return await http.send(request), server, http
            except ToolError as error:
                return error, server, http

    return asyncio.run(run())


FAULTS = {
    "401": (always(401, b'{"error": "bad key"}'), "unauthorized: HTTP 401", 1),
    "402": (always(402, b'{"error": "pay"}'), "quota: HTTP 402", 1),
    "403": (always(403), "unauthorized: HTTP 403", 1),
    "404": (always(404), "bad_response: HTTP 404", 1),
    "429": (always(429), "rate_limited: HTTP 429", 3),
    "429, soon": (always(429, Retry_After="0"), "rate_limited: HTTP 429", 3),
    "429, tomorrow": (always(429, Retry_After="86400"), "rate_limited: HTTP 429", 1),
    "500": (always(500, b"oops"), "server_error: HTTP 500", 3),
    "501": (always(501), "server_error: HTTP 501", 1),
    "502": (always(502), "server_error: HTTP 502", 3),
    "503": (always(503), "server_error: HTTP 503", 3),
    "504": (always(504), "server_error: HTTP 504", 3),
    "304": (always(304), "bad_response: HTTP 304", 1),
    "redirect without end": (always(302, Location="/"), "bad_response: more than 5 redirects", 6),
    "redirect to a file": (always(302, Location="file:///etc/passwd"), "refused: only http", 1),
    "reset at once": (reset_at_once, "unreachable: the connection broke", 3),
    "reset in the middle": (reset_in_the_middle, "unreachable: the connection broke", 3),
    "end in the middle": (end_in_the_middle, "unreachable: the connection broke", 3),
    "broken chunks": (broken_chunks, "bad_response: the answer is not HTTP", 1),
    "no HTTP": (no_http, "bad_response: the answer is not HTTP", 1),
    "endless head": (endless_head, "bad_response: the answer is not HTTP", 1),
    "unknown encoding": (always(body=b"x", Content_Encoding="br"), "bad_response: content enc", 1),
    "broken gzip": (always(body=b"x" * 99, Content_Encoding="gzip"), "bad_response: the comp", 1),
    "half a gzip": (
        always(body=gzip.compress(random.Random(0).randbytes(999))[:500], Content_Encoding="gzip"),
        "bad_response: the compressed body ends too early",
        1,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_have_names_and_the_right_number_of_tries(fault):
    handler, text, tries = FAULTS[fault]
    error, server, http = ask(handler, HttpConfig(backoff=0.01, backoff_max=0.01))
    assert isinstance(error, HttpError) and str(error).startswith(text), error
    assert len(server.heads) == tries
    counters = http.counters()
    assert counters["p/calls"] == counters["p/errors"] == 1
    retries = tries - 1 if "redirect" not in fault else 0
    assert counters["p/retries"] == retries
    assert counters[f"p/faults/{error.kind}"] == retries + 1


@pytest.mark.parametrize("handler", [hang, drip, slow_head], ids=["hang", "drip", "slow head"])
def test_a_server_that_takes_for_ever_costs_no_more_than_the_deadline(handler):
    started = time.monotonic()
    error, server, http = ask(handler, deadline=0.4)
    assert str(error) == "timeout: 0.4 s are over, waiting for the server"
    assert time.monotonic() - started < 30  # the server would take a minute
    assert http.counters()["p/faults/timeout"] == 1 and len(server.heads) == 1


def test_silence_ends_a_try_but_not_the_call():
    async def once(head, reader, writer, seen=[]):  # noqa: B006 the list is the handler's memory
        seen.append(head)
        if len(seen) == 1:
            await hang(head, reader, writer)
        writer.write(response(body=b"[]"))

    config = HttpConfig(backoff=0.01, read_timeout=0.5)
    answer, server, http = ask(once, config)
    assert answer.json() == [] and len(server.heads) == 2
    assert http.counters()["p/faults/timeout"] == 1 and http.counters()["p/errors"] == 0


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_another_try_mends_it(status):
    handler = in_turn(response(status), response(status), response(body=b'{"a": 1}'))
    answer, server, http = ask(handler)
    assert answer.json() == {"a": 1} and len(server.heads) == 3
    counters = http.counters()
    assert counters["p/calls"] == 1 and counters["p/errors"] == 0 and counters["p/retries"] == 2
    assert sum(v for name, v in counters.items() if "/faults/" in name) == 2


def test_a_reset_is_mended_too():
    async def first_bad(head, reader, writer, seen=[]):  # noqa: B006
        seen.append(head)
        if len(seen) == 1:
            await reset_in_the_middle(head, reader, writer)
        else:
            writer.write(response(body=b"[1]"))

    assert ask(first_bad)[0].json() == [1]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_obeyed(form):
    """By the pause that the client asks its clock for; nobody really waits."""
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    now = time.time()
    later = "3" if form == "seconds" else email.utils.formatdate(now + 3, usegmt=True)
    busy = response(503, Retry_After=later, Date=email.utils.formatdate(now, usegmt=True))

    async def run():
        http = Http(HttpConfig(backoff=0.01), sleep=sleep)
        async with FaultServer(in_turn(busy, response(body=b"[]"))) as server, http:
            request = HttpRequest("p", "GET", server.url, deadline=10)
            await http.send(request)
            server.handler = always(503, Retry_After="11")
            with pytest.raises(ToolError, match="^server_error"):
                await http.send(request)

    asyncio.run(run())
    assert len(pauses) == 1 and 2.99 <= pauses[0] <= 3.01


def test_all_calls_to_a_provider_wait_when_it_says_so():
    async def run():
        async with FaultServer(always(429, Retry_After="30")) as server, Http(QUICK) as http:
            request = HttpRequest("p", "GET", server.url, deadline=5)
            with pytest.raises(ToolError, match="^rate_limited: HTTP 429"):
                await http.send(request)
            with pytest.raises(
                ToolError, match="^rate_limited: the next request may go in (30|29)"
            ):
                await http.send(request)
            assert len(server.heads) == 1
            with pytest.raises(ToolError, match="^rate_limited: HTTP 429"):
                await http.send(HttpRequest("other", "GET", server.url, deadline=5))

    asyncio.run(run())


@pytest.mark.parametrize(
    "body, content_type, text",
    [
        (b'{"a": [1, 2', "application/json", "broken JSON of 11 bytes"),
        (b"", "application/json", "broken JSON of 0 bytes"),
        (b'{"a": NaN}', "application/json", "broken JSON"),
        (b'{"a": "\xff"}', "application/json", "broken JSON"),
        (b"[" * 200_000, "application/json", "the JSON is nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "application/json", "broken JSON"),
        (b'{"a": 1}', "text/html; charset=utf-8", "JSON expected, text/html came"),
        (b"<html>busy</html>", "text/html", "JSON expected, text/html came"),
    ],
)
def test_bodies_that_are_no_json(body, content_type, text):
    answer, _, _ = ask(always(body=body, content_type=content_type))
    with pytest.raises(ToolError, match=f"^bad_response: {text}"):
        answer.json()


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "text/json", ""])
def test_bodies_that_are_json(content_type):
    body = '{"a": "日本", "b": "x\\ud800y", "\\udfff": ["\\ud83d\\ude00"]}'.encode()
    answer, _, _ = ask(always(body=body, content_type=content_type))
    assert answer.json() == {"a": "日本", "b": "x?y", "?": ["😀"]}  # what utf-8 cannot say is gone


def deflated(data):
    squeeze = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return squeeze.compress(data) + squeeze.flush()


@pytest.mark.parametrize(
    "encoding, squeeze",
    [
        ("gzip", gzip.compress),
        ("GZIP", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
        ("x-gzip", lambda data: gzip.compress(data) + b"\0\0\0"),
        ("deflate", zlib.compress),
        ("deflate", deflated),
        ("identity", bytes),
    ],
)
def test_compressed_bodies(encoding, squeeze):
    data = bytes(range(256)) * 1000
    answer, server, _ = ask(always(body=squeeze(data), Content_Encoding=encoding))
    assert answer.body == data and header(server.heads[0], "accept-encoding") == "gzip, deflate"
    error, _, _ = ask(always(body=squeeze(data), Content_Encoding=encoding), max_bytes=255_999)
    assert str(error) == "too_large: the body has more than 255999 bytes"


def bomb():
    """A gigabyte of zeros in a megabyte, as gzip: one block that stands alone, 1024 times."""
    squeeze = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + block * 1024


def test_a_compressed_bomb_is_cut_off_early():
    body, sent = bomb(), []

    async def handler(head, reader, writer):
        writer.write(
            response(body=b"", Content_Encoding="gzip").replace(b"Length: 0", b"Length: 9999999")
        )
        for start in range(0, len(body), 4096):
            writer.write(body[start : start + 4096])
            sent.append(start)
            await writer.drain()
            await asyncio.sleep(0)

    tracemalloc.start()
    error, server, _ = ask(handler, max_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(error) == "too_large: the body has more than 1048576 bytes"
    assert len(body) > 1_000_000 and len(server.heads) == 1
    assert peak < 16 << 20, f"{peak} bytes for a limit of 1 MiB"  # unpacked it is 1024 MiB
    print(f"bomb of {len(body)} bytes, 1 GiB unpacked: peak {peak / 2**20:.1f} MiB")


def test_a_body_longer_than_it_says_and_one_without_end():
    error, _, _ = ask(always(body=b"x" * 2000), max_bytes=1000)
    assert error.kind == "too_large"

    async def endless(head, reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(65_536))
            await writer.drain()

    error, _, _ = ask(endless, max_bytes=1 << 20)
    assert error.kind == "too_large"

    async def empty_members(head, reader, writer):  # compressed bytes that yield none
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n")
        while True:
            writer.write(gzip.compress(b"") * 100)
            await writer.drain()

    error, _, _ = ask(empty_members, max_bytes=1 << 20)
    assert str(error) == "bad_response: more than 64 gzip members"


def test_keys_are_in_no_error_and_no_log(caplog):
    caplog.set_level(logging.DEBUG)
    quoted = "sk-very%2Bsecret%2Fkey%3D123"

    async def echo(head, reader, writer):
        text = f"bad key {KEY} in http://127.0.0.1{path(head)} and {'x' * 90}{KEY}".encode()
        writer.write(response(400, text, "text/plain"))

    async def broken(head, reader, writer):
        writer.write(f"{KEY} {quoted}\r\n\r\n".encode())
        writer.close()

    async def away(head, reader, writer):
        writer.write(response(302, Location=f"gopher://h/?api_key={KEY}"))

    async def back(head, reader, writer):
        writer.write(response(302, Location=f"http://127.0.0.1:1/?api_key={quoted}"))

    texts = []
    for handler in (echo, broken, away, back, hang, always(401, KEY.encode(), "text/plain")):
        error, server, _ = ask(
            handler,
            path="/search?engine=x",
            params={"api_key": KEY},
            headers={"X-Api-Key": KEY},
            secrets=(KEY,),
            deadline=1.0 if handler is hang else 20.0,
        )
        assert quoted in server.heads[0] and header(server.heads[0], "x-api-key") == KEY
        chain = [error, error.__cause__, error.__context__ if not error.__suppress_context__ else 0]
        texts += [repr(one) for one in chain if one] + [str(error), str(error.body)]
    texts += [record.getMessage() for record in caplog.records]
    assert any("bad key ***" in text for text in texts)
    for text in texts:
        assert "secret" not in text and "sk-very" not in text, text


def test_a_key_that_no_header_can_hold_is_not_shown():
    error, server, _ = ask(always(), headers={"X-Api-Key": "sécret\nx"}, secrets=("sécret\nx",))
    assert str(error).startswith("refused: no such request can be sent") and not server.heads
    assert "cret" not in repr(HttpRequest("p", "GET", "http://x", secrets=("sécret",)))


def test_keys_do_not_follow_a_redirect_to_another_server():
    async def run():
        async with FaultServer(always(body=b"[]")) as other, Http(QUICK) as http:
            async with FaultServer(always(301, Location=other.url + "/x")) as server:
                headers = {"Authorization": f"Bearer {KEY}"}
                answer = await http.send(HttpRequest("p", "GET", server.url, headers=headers))
                assert answer.url == other.url + "/x"
            assert header(other.heads[0], "authorization") is None
            assert header(server.heads[0], "authorization") == f"Bearer {KEY}"

    asyncio.run(run())


def test_a_post_is_sent_as_json_and_not_redirected():
    answer, server, _ = ask(always(body=b"[]"), method="POST", json={"q": "日本"})
    assert header(server.heads[0], "content-type") == "application/json"
    assert server.bodies[0] == '{"q":"日本"}'.encode()
    error, server, _ = ask(always(302, Location="/b"), method="POST", json={})
    assert str(error) == "bad_response: a POST was redirected" and len(server.heads) == 1


def test_what_the_server_said_is_kept_for_the_provider():
    error, _, _ = ask(always(400, b'{"message": "Not enough credits"}'))
    assert (error.kind, error.status) == ("bad_response", 400)
    assert error.body == b'{"message": "Not enough credits"}'
    assert str(error) == 'bad_response: HTTP 400: {"message": "Not enough credits"}'


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "file:///etc/passwd", "nonsense", "http://"])
def test_urls_that_are_no_http(url):
    async def run():
        async with Http(QUICK) as http:
            await http.send(HttpRequest("p", "GET", url))

    with pytest.raises(ToolError, match="^refused"):
        asyncio.run(run())


def test_nobody_listens():
    async def run():
        async with FaultServer(always()) as server:
            pass
        async with Http(QUICK) as http:
            await http.send(HttpRequest("p", "GET", server.url))

    with pytest.raises(ToolError, match="^unreachable: no connection"):
        asyncio.run(run())


def test_connections_are_kept_for_a_provider():
    peers = set()

    async def handler(head, reader, writer):
        peers.add(writer.get_extra_info("peername"))
        writer.write(response(body=b"[]"))

    async def run():
        async with FaultServer(handler) as server, Http(QUICK) as http:
            for _ in range(5):
                await http.send(HttpRequest("p", "GET", server.url))

    asyncio.run(run())
    assert len(peers) == 1


def test_a_caller_that_leaves_takes_its_request_along():
    async def run():
        async with FaultServer(hang) as server, Http(QUICK) as http:
            task = asyncio.ensure_future(http.send(HttpRequest("p", "GET", server.url)))
            while not server.heads:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            server.handler = always(body=b"[]")
            assert (await http.send(HttpRequest("p", "GET", server.url))).json() == []
            assert http.counters()["p/calls"] == 2 and http.counters()["p/errors"] == 0

    asyncio.run(run())


def test_a_storm_of_faults_loses_no_call():
    """300 calls, 32 at a time, 40 % faults of all kinds: each ends as a result or a named error."""
    chance = random.Random(7)
    faults = [hang, drip, reset_at_once, reset_in_the_middle, end_in_the_middle, no_http]
    faults += [always(status) for status in (401, 402, 404, 429, 500, 503)]
    faults += [always(body=b"x", Content_Encoding="gzip")]

    async def handler(head, reader, writer):
        if chance.random() < 0.4:
            await chance.choice(faults)(head, reader, writer)
        else:
            writer.write(response(body=path(head)[2:].encode()))

    async def run():
        limits = Limits(rate=10_000, burst=1000, concurrency=32, breaker_failures=1000)
        config = HttpConfig(backoff=0.01, retries=1, default_limits=limits)
        many = asyncio.Semaphore(32)
        async with FaultServer(handler) as server, Http(config, rng=random.Random(1)) as http:

            async def call(number):
                request = HttpRequest("p", "GET", f"{server.url}/?{number}", deadline=2.0)
                async with many:
                    started = time.monotonic()
                    try:
                        answer = (await http.send(request)).json()
                        assert answer == number
                        kind = "good"
                    except ToolError as error:
                        kind = error.kind
                    return kind, time.monotonic() - started

            ended = await asyncio.gather(*(call(number) for number in range(300)))
            return ended, http.counters()

    ended, counters = asyncio.run(run())
    kinds = [kind for kind, _ in ended]
    assert len(ended) == counters["p/calls"] == 300
    assert kinds.count("good") == 300 - counters["p/errors"] > 150
    assert max(seconds for _, seconds in ended) < 30
    print({kind: kinds.count(kind) for kind in sorted(set(kinds))}, counters)

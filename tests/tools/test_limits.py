"""Rate limit, concurrency limit, circuit breaker, pauses and redaction, by a clock that we turn."""

import asyncio
import email.utils
import math
import random
import sys
import time
import traceback

import httpx
import pytest
from fault_server import FaultServer, always

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.http import Http, HttpConfig, HttpRequest
from mmsr_jax.tools.limits import Breaker, Bucket, Gate, Limits
from mmsr_jax.tools.redact import redact, redact_bytes
from mmsr_jax.tools.retry import Pauses, retry_after

PUBLIC = "93.184.215.14"


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds


def test_bucket_lets_a_burst_go_and_then_the_rate():
    clock = Clock()
    bucket = Bucket(rate=2.0, burst=3, clock=clock)
    assert [bucket.take(10) for _ in range(6)] == [0, 0, 0, 0.5, 1.0, 1.5]
    clock.now += 1.5  # all reserved tokens are good now
    assert bucket.take(10) == 0.5
    clock.now += 1000
    assert [bucket.take(10) for _ in range(4)] == [0, 0, 0, 0.5]  # no more than a burst was saved


def test_bucket_refuses_what_would_come_too_late_and_keeps_the_place():
    bucket = Bucket(rate=1.0, burst=1, clock=Clock())
    assert bucket.take(0) == 0
    with pytest.raises(ToolError, match="^rate_limited: the next request may go in 1.0 s"):
        bucket.take(0.9)
    assert bucket.take(1.0) == 1.0
    bucket.give_back()
    assert bucket.take(1.0) == 1.0


def test_bucket_closes():
    clock = Clock()
    bucket = Bucket(rate=100, burst=10, clock=clock)
    bucket.close(20)
    bucket.close(5)  # the longer one counts
    assert bucket.take(30) == 20
    clock.now += 21
    assert bucket.take(30) == 0


def test_breaker_opens_probes_and_closes():
    clock = Clock()
    breaker = Breaker(failures=3, seconds=10, clock=clock)
    for good in (False, False, True, False, False):
        breaker.record(breaker.enter(), good)
    breaker.record(breaker.enter(), False)  # never three in a row before
    with pytest.raises(ToolError, match="^circuit_open: 3 failures in a row, next try in 10.0 s"):
        breaker.enter()
    clock.now += 10
    probe = breaker.enter()
    with pytest.raises(ToolError, match="one probe is under way"):
        breaker.enter()
    breaker.record(probe, False)
    with pytest.raises(ToolError, match="next try in 10.0 s"):
        breaker.enter()
    clock.now += 10
    breaker.record(breaker.enter(), None)  # the probe's caller left: another one may probe
    breaker.record(breaker.enter(), True)
    breaker.enter()
    breaker.enter()


def test_stragglers_say_nothing_about_a_circuit_that_has_opened_since():
    clock = Clock()
    breaker = Breaker(failures=1, seconds=10, clock=clock)
    early = [breaker.enter() for _ in range(4)]
    breaker.record(early[0], False)
    breaker.record(early[1], True)  # from before: it does not close it
    with pytest.raises(ToolError, match="circuit_open"):
        breaker.enter()
    clock.now += 10
    probe = breaker.enter()
    for token, good in zip(early[2:], (None, False), strict=True):
        breaker.record(token, good)
        with pytest.raises(ToolError, match="one probe is under way"):
            breaker.enter()
    assert breaker.enter(probe) == probe
    with pytest.raises(ToolError, match="circuit_open"):
        breaker.enter(early[3])  # it waited while the circuit opened
    breaker.record(probe, True)
    assert breaker.enter(early[3]) == breaker.enter()


def test_who_waited_while_the_circuit_opened_is_not_sent():
    sent = []

    async def handler(request):
        sent.append(request)
        await asyncio.sleep(0.02)
        return httpx.Response(500)

    limits = Limits(concurrency=1, breaker_failures=2, rate=1000, burst=1000)
    config = HttpConfig(retries=0, default_limits=limits)
    http = Http(config, transport=httpx.MockTransport(handler))

    async def run():
        calls = [http.send(HttpRequest("a", "GET", "http://a/")) for _ in range(6)]
        kinds = [error.kind for error in await asyncio.gather(*calls, return_exceptions=True)]
        assert kinds == ["server_error"] * 2 + ["circuit_open"] * 4 and len(sent) == 2

    asyncio.run(run())


def test_a_provider_that_says_wait_holds_those_who_wait_already():
    clock = Clock()
    gate = Gate(Limits(rate=1, burst=1), clock, None)
    slept = []

    async def sleep(seconds):
        slept.append(seconds)
        clock.now += seconds
        if len(slept) == 1:
            gate.bucket.close(30)  # the answer of another call came in the meantime

    gate._sleep = sleep

    async def run():
        async with gate.admitted(lambda: 100):
            pass
        async with gate.admitted(lambda: 100):
            assert slept == [1, 30] and not gate.bucket.closed
        async with gate.admitted(lambda: 100):
            slept.clear()
        with pytest.raises(ToolError, match="^rate_limited: the next request may go in 30"):
            async with gate.admitted(lambda: 20):
                raise AssertionError("it must not be let in")

    asyncio.run(run())


def test_a_broken_provider_is_left_alone_and_others_are_not():
    clock = Clock()
    limits = {"a": Limits(breaker_failures=3, breaker_seconds=10)}
    sent = []

    def handler(request):
        sent.append(request.url.host)
        return httpx.Response(500 if broken else 200)

    broken = True
    config = HttpConfig(retries=1, backoff=0.01, limits=limits)
    http = Http(config, transport=httpx.MockTransport(handler), clock=clock, sleep=clock.sleep)

    async def kinds(provider, count):
        found = []
        for _ in range(count):
            try:
                found.append((await http.send(HttpRequest(provider, "GET", "http://a/"))).status)
            except ToolError as error:
                found.append(error.kind)
        return found

    async def run():
        nonlocal broken
        # The second call opens the circuit with its first try, and says what went wrong.
        expected = ["server_error", "server_error", "circuit_open", "circuit_open"]
        assert await kinds("a", 4) == expected and len(sent) == 3
        assert await kinds("b", 1) == ["server_error"]
        clock.now += 11
        broken = False
        assert await kinds("a", 2) == [200, 200]
        assert http.counters()["a/faults/circuit_open"] == 2

    asyncio.run(run())


def test_a_server_that_says_no_is_not_broken():
    def handler(request):
        return httpx.Response(401)

    limits = Limits(breaker_failures=2, rate=1000, burst=1000)
    http = Http(HttpConfig(default_limits=limits), transport=httpx.MockTransport(handler))

    async def run():
        for _ in range(5):
            with pytest.raises(ToolError, match="^unauthorized"):
                await http.send(HttpRequest("a", "GET", "http://a/"))

    asyncio.run(run())


def test_a_dead_page_does_not_close_the_web():
    def handler(request):
        return httpx.Response(500 if request.headers["host"] == "dead.example" else 200)

    async def resolve(host, port):
        return [PUBLIC]

    limits = Limits(breaker_failures=2)
    config = HttpConfig(retries=0, default_limits=limits)
    http = Http(config, transport=httpx.MockTransport(handler), resolve=resolve)

    async def run():
        found = []
        for host in ("dead.example", "dead.example", "dead.example", "live.example"):
            request = HttpRequest("web", "GET", f"http://{host}/", public_only=True)
            try:
                found.append((await http.send(request)).status)
            except ToolError as error:
                found.append(error.kind)
        assert found == ["server_error", "server_error", "circuit_open", 200]

    asyncio.run(run())


def test_rate_and_concurrency_hold_over_many_calls():
    clock, under_way, most, times = Clock(), 0, 0, []

    async def handler(request):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        times.append(clock.now)
        for _ in range(3):
            await asyncio.sleep(0)
        under_way -= 1
        return httpx.Response(200)

    async def sleep(seconds):  # everybody waits on one clock, in the order of time
        until = clock.now + seconds
        while clock.now < until:
            await asyncio.sleep(0)
            if not under_way:
                clock.now += 0.01

    limits = {"a": Limits(rate=10, burst=5, concurrency=4)}
    transport = httpx.MockTransport(handler)
    http = Http(HttpConfig(limits=limits), transport=transport, clock=clock, sleep=sleep)

    async def run():
        calls = [http.send(HttpRequest("a", "GET", "http://a/", deadline=60)) for _ in range(40)]
        await asyncio.gather(*calls)

    asyncio.run(run())
    assert most <= 4 and len(times) == 40
    for window in range(35):  # never more than a burst and the rate allow
        assert times[window + 5] - times[window] > 0.1 - 1e-6
    assert times[-1] - times[0] >= 3.4


def test_a_wait_in_the_queue_ends_with_the_deadline():
    async def hang(head, reader, writer):
        await asyncio.sleep(60)

    config = HttpConfig(default_limits=Limits(concurrency=1))

    async def run():
        async with FaultServer(hang) as server, Http(config) as http:
            first = asyncio.ensure_future(http.send(HttpRequest("p", "GET", server.url)))
            while not server.heads:
                await asyncio.sleep(0.01)
            with pytest.raises(ToolError, match="^timeout: 0.1 s are over, waiting for a slot"):
                await http.send(HttpRequest("p", "GET", server.url, deadline=0.1))
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    asyncio.run(run())


def test_our_own_slowness_does_not_open_a_circuit():
    async def hang(head, reader, writer):
        await asyncio.sleep(60)

    limits = Limits(concurrency=1, breaker_failures=1, rate=1, burst=1)

    async def run():
        async with FaultServer(hang) as server, Http(HttpConfig(default_limits=limits)) as http:
            server.handler = always(body=b"[]")
            await http.send(HttpRequest("p", "GET", server.url))
            server.handler = hang
            # 1.0 s of its 1.2 s go by before the rate limit lets it out.
            with pytest.raises(ToolError, match="^timeout"):
                await http.send(HttpRequest("p", "GET", server.url, deadline=1.2))
            server.handler = always(body=b"[]")
            assert (await http.send(HttpRequest("p", "GET", server.url))).json() == []

    asyncio.run(run())


def test_pauses_grow_and_are_jittered():
    pauses = Pauses(0.5, 4.0, random.Random(0))
    for tries, most in enumerate([0.5, 1, 2, 4, 4, 4]):
        drawn = [pauses.draw(tries) for _ in range(300)]
        assert 0 <= min(drawn) < most * 0.05 and most * 0.95 < max(drawn) <= most
    assert pauses.draw(10_000) <= 4


def test_retry_after_reads_seconds_and_dates():
    assert retry_after(None) is None
    assert retry_after(" 7 ") == 7 and retry_after("0") == 0 and retry_after("1.5") == 1.5
    assert retry_after("9" * 5000) == math.inf
    for bad in ("", "soon", "-5", "٣", "1e9", "Mon", "99999999999999999999 Jan"):
        assert retry_after(bad) is None
    now = time.time()
    date = email.utils.formatdate
    assert 58 < retry_after(date(now + 60, usegmt=True)) <= 60
    assert retry_after(date(now - 60, usegmt=True)) == 0
    # The server's clock is an hour behind ours; it wants ten seconds all the same.
    assert retry_after(date(now - 3590, usegmt=True), date(now - 3600, usegmt=True)) == 10


def test_redaction():
    key = "a+b/c=="
    text = f"{key} a%2Bb%2Fc%3D%3D YStiL2M9PQ== see https://u:p@h.example/x?q={key}#f, ok?"
    assert redact(text, (key,)) == "*** *** *** see https://***@h.example/x?*** ok?"
    assert redact("nothing to hide?", ("", "zz")) == "nothing to hide?"
    assert redact_bytes(b"\xff" + key.encode(), (key,)) == b"\xff***"


@pytest.mark.parametrize(
    "fields",
    [{"rate": 0}, {"rate": -1}, {"burst": 0}, {"concurrency": 0}, {"breaker_seconds": 0}],
)
def test_limits_that_are_none(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, not {value}"):
        Limits(**fields)


def test_proxies_are_for_providers_only(monkeypatch):
    async def run():
        async with FaultServer(always(body=b"[]")) as proxy:
            monkeypatch.setenv("http_proxy", proxy.url)
            monkeypatch.setenv("no_proxy", "direct.invalid")
            async with Http(HttpConfig(retries=0)) as http:
                url = "http://provider.example/x?y=1"
                assert (await http.send(HttpRequest("p", "GET", url))).json() == []
                assert proxy.heads[0].startswith(f"GET {url} HTTP/1.1")
                with pytest.raises(ToolError, match="^unreachable"):
                    await http.send(HttpRequest("p", "GET", "http://direct.invalid/"))
                with pytest.raises(ToolError, match="^refused"):
                    request = HttpRequest("p", "GET", "http://10.0.0.1/", public_only=True)
                    await http.send(request)
            assert len(proxy.heads) == 1

    asyncio.run(run())


@pytest.mark.parametrize("name", ["http_proxy", "all_proxy", "ALL_PROXY"])
def test_a_proxy_may_be_written_without_its_scheme(monkeypatch, name):
    async def run():
        async with FaultServer(always(body=b"[]")) as proxy:
            monkeypatch.setenv(name, f"127.0.0.1:{proxy.port}")
            async with Http(HttpConfig(retries=0)) as http:
                await http.send(HttpRequest("p", "GET", "http://provider.example/"))
            assert proxy.heads[0].startswith("GET http://provider.example/ HTTP/1.1")

    asyncio.run(run())


@pytest.mark.parametrize("address", ["ftp://me:s3cret@p.example", "me:s3cret@p.example:port"])
def test_a_proxy_that_is_none_is_named_without_its_password(monkeypatch, address):
    monkeypatch.setenv("https_proxy", address)
    with pytest.raises(ValueError, match="the https proxy of the environment is none") as raised:
        Http(HttpConfig())
    shown = "".join(traceback.format_exception(raised.value))
    assert "s3cret" not in shown


def test_a_socks_proxy_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("all_proxy", "socks5://p.example:1080")
    with pytest.raises(ValueError, match=r"proxy speaks socks5: pip install 'httpx\[socks\]'"):
        Http(HttpConfig())


def test_no_key_is_in_what_a_request_or_an_answer_shows():
    key = "sk-s3cret-0123456789"
    request = HttpRequest(
        "p", "GET", f"http://a.example/?q={key}", {"api_key": key}, {"X-Key": key}, {"key": key},
        secrets=(key,),
    )  # fmt: skip
    transport = httpx.MockTransport(lambda r: httpx.Response(200, content=r.url.query))
    answer = asyncio.run(Http(HttpConfig(), transport=transport).send(request))
    assert key.encode() in answer.body
    assert key not in repr(request) + repr(answer) + answer.url
    assert answer.url.startswith("http://a.example/")

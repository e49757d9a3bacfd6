"""Money is spent on what went out, on nothing else, and never twice by two processes."""

import asyncio
import fcntl
import json
import threading

import pytest
from fault_server import FaultServer, always, reset, response

from mmsr_jax.tools import budget as budgets
from mmsr_jax.tools.assembly import WebConfig
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.budget import Budget, SearchStopped
from mmsr_jax.tools.http import Http, HttpConfig, HttpRequest
from mmsr_jax.tools.limits import Limits
from mmsr_jax.tools.providers.jina import JinaSearchConfig
from mmsr_jax.tools.providers.retriever import RetrieverConfig
from mmsr_jax.tools.providers.searxng import SearxngConfig
from mmsr_jax.tools.providers.serpapi import SerpApiConfig, SerpApiLens, SerpApiText
from mmsr_jax.tools.providers.serper import SerperConfig, SerperText

QUICK = HttpConfig(backoff=0.01, default_limits=Limits(rate=1000, burst=1000))


async def reset_in_the_middle(head, reader, writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 100)
    await writer.drain()
    await asyncio.sleep(0.02)
    reset(writer)


async def hang(head, reader, writer):
    await asyncio.sleep(60)


def in_turn(*handlers):
    left = list(handlers)

    async def handler(head, reader, writer):
        await (left.pop(0) if len(left) > 1 else left[0])(head, reader, writer)

    return handler


def pay(handler, budget, price=0.25, config=QUICK, deadline=10.0, url=None, **fields):
    """One paid call to a server -> (kind of its error or None, requests that came)."""

    async def run():
        async with FaultServer(handler) as server, Http(config) as http:
            request = HttpRequest("p", "POST", url or server.url, deadline=deadline, **fields)
            try:
                with budget.hold("p", price):
                    (await http.send(request)).json()
                kind = None
            except ToolError as error:
                kind = error.kind
            return kind, len(server.heads)

    return asyncio.run(run())


GOOD = always(body=b"[]")


@pytest.mark.parametrize(
    ("handler", "kind", "requests", "billed"),
    [
        (GOOD, None, 1, 1),
        (reset_in_the_middle, "unreachable", 3, 3),  # each was answered, and each may be billed
        (in_turn(reset_in_the_middle, GOOD), None, 2, 2),
        (in_turn(always(503), GOOD), None, 2, 1),
        (in_turn(reset_in_the_middle, always(503)), "server_error", 3, 1),
        (always(401), "unauthorized", 1, 0),
        (always(402), "quota", 1, 0),
        (always(429), "rate_limited", 3, 0),
        (always(500), "server_error", 3, 0),
        (always(body=b"{"), "bad_response", 1, 1),
        (always(404), "bad_response", 1, 1),
    ],
)
def test_what_may_be_billed_is_booked_try_by_try(handler, kind, requests, billed):
    budget = Budget()
    assert pay(handler, budget) == (kind, requests)
    assert budget.spent == billed * 0.25 and budget._held == 0
    assert budget.calls == (billed > 0)


def test_no_try_without_money_for_it():
    budget = Budget(0.6)
    assert pay(reset_in_the_middle, budget) == ("unreachable", 2)
    assert budget.spent == 0.5 and budget.stopped


def test_what_never_went_out_costs_nothing():
    budget = Budget()
    assert pay(GOOD, budget, url="http://127.0.0.1:1")[0] == "unreachable"
    assert pay(GOOD, budget, url="ftp://127.0.0.1")[0] == "refused"
    assert pay(GOOD, budget, public_only=True)[0] == "refused"
    assert budget.spent == 0 and budget.calls == 0
    assert pay(hang, budget, deadline=0.3) == ("timeout", 1)
    assert budget.spent == 0.25


def test_calls_that_time_out_in_the_queue_cost_nothing():
    budget = Budget()
    config = HttpConfig(retries=0, default_limits=Limits(concurrency=1))

    async def call(http, url):
        with budget.hold("p", 0.25):
            await http.send(HttpRequest("p", "POST", url, deadline=0.4))

    async def run():
        async with FaultServer(hang) as server, Http(config) as http:
            calls = [call(http, server.url) for _ in range(20)]
            ended = await asyncio.gather(*calls, return_exceptions=True)
            assert {error.kind for error in ended} == {"timeout"}
            return len(server.heads)

    sent = asyncio.run(run())
    # The last one may have gone out without having been read when everything ended.
    assert 1 <= sent < 20 and budget.spent in (sent * 0.25, (sent + 1) * 0.25)


def test_a_caller_that_leaves_pays_for_what_went_out():
    budget = Budget()

    async def run():
        async with FaultServer(hang) as server, Http(QUICK) as http:

            async def call():
                with budget.hold("p", 0.25):
                    await http.send(HttpRequest("p", "GET", server.url))

            task = asyncio.ensure_future(call())
            while not server.heads:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert budget.spent == 0.25 and budgets.current() is None


def test_a_service_that_says_it_bills_nothing():
    """SerpApi's and Serper's own words count like a status."""
    failed = {"search_metadata": {"status": "Error"}, "error": "x"}
    budget = Budget()

    async def search(make, *answer):
        async with FaultServer(always(*answer)) as server, Http(QUICK) as http:
            with pytest.raises(ToolError) as raised, budget.hold("p", 0.25):
                await make(server.url, http).search("q", 1, 5.0)
            return raised.value.kind

    def serpapi(url, http):
        return SerpApiText(SerpApiConfig(url), http, "key-0123456789")

    def serper(url, http):
        return SerperText(SerperConfig(url), http, "key-0123456789")

    assert asyncio.run(search(serpapi, 200, json.dumps(failed).encode())) == "server_error"
    assert asyncio.run(search(serper, 400, b'{"message": "Not enough credits"}')) == "quota"
    assert budget.spent == 0
    assert asyncio.run(search(serper, 200, b"[]")) == "bad_response"
    assert budget.spent == 0.25


class Slow:
    async def publish(self, picture):
        await asyncio.sleep(60)


class Broken:
    async def publish(self, picture):
        raise ToolError("bad_picture", "it cannot be decoded")


@pytest.mark.parametrize(("uploader", "kind"), [(Slow(), "timeout"), (Broken(), "bad_picture")])
def test_a_picture_that_is_not_published_costs_no_search(uploader, kind):
    budget = Budget()

    async def run():
        async with Http(QUICK) as http:
            lens = SerpApiLens(
                SerpApiConfig("http://127.0.0.1:1"), http, "key-0123456789", uploader
            )
            with budget.hold("serpapi", 0.25):
                await lens.search(b"picture", 5, 0.1)

    with pytest.raises(ToolError, match=f"^{kind}"):
        asyncio.run(run())
    assert budget.spent == 0


def test_processes_that_share_a_ledger_share_what_is_set_aside(tmp_path):
    ledger = tmp_path / "payments.jsonl"
    some = [Budget(1.0, ledger) for _ in range(4)]
    with some[0].hold("p", 0.9) as held:
        for other in some[1:]:
            with pytest.raises(ToolError, match="^budget"), other.hold("p", 0.9):
                raise AssertionError("it must not be called")
        held.cost = 0.3
    assert [budget.spent for budget in some if not budget._catch_up()] == [0.3] * 4
    with some[1].hold("p", 0.7):
        pass
    assert Budget(1.0, ledger).spent == 1.0


def test_setting_aside_waits_for_the_ledgers_lock(tmp_path):
    """As another process holds it, which then spends the money."""
    ledger, kinds = tmp_path / "payments.jsonl", []

    def call():
        try:
            with Budget(1.0, ledger).hold("p", 0.4):
                kinds.append("called")
        except ToolError as error:
            kinds.append(error.kind)

    thread = threading.Thread(target=call)
    with ledger.open("ab", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and not kinds
        other.write(b'{"cost": 0.9}\n')
    thread.join(20)
    assert kinds == ["budget"]


def test_a_kill_leaves_the_money_spent_and_a_price_without_surprise_is_one_line(tmp_path):
    ledger = tmp_path / "payments.jsonl"
    with Budget(1.0, ledger).hold("p", 0.4):
        assert Budget(1.0, ledger).spent == 0.4  # as the next process finds it after a kill
    assert ledger.read_text().count("cost") == 1
    budget = Budget(1.0, ledger)
    with pytest.raises(ToolError), budget.hold("p", 0.4):
        raise ToolError("timeout")  # before anything was sent
    assert Budget(1.0, ledger).spent == budget.spent == 0.4


def test_a_full_disk_takes_no_answer_away(tmp_path, monkeypatch, caplog):
    budget = Budget(1.0, tmp_path / "payments.jsonl")

    def full(*_):
        raise OSError(28, "No space left on device")

    with budget.hold("p", 0.4) as held:
        held.cost = 0.1
        monkeypatch.setattr(budget, "_write", full)
    assert budget.spent == 0.4 and "correction of -0.3 US dollars is lost: No space" in caplog.text


def test_a_redirect_is_one_try():
    there = response(302, Location="/there")

    async def handler(head, reader, writer):
        writer.write(response(body=b"[]") if "/there" in head.split("\r\n")[0] else there)

    budget = Budget()

    async def run():
        async with FaultServer(handler) as server, Http(QUICK) as http:
            with budget.hold("p", 0.25):
                await http.send(HttpRequest("p", "GET", server.url))

    asyncio.run(run())
    assert budget.spent == 0.25


def test_a_ledger_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    budget = Budget(1.0, tmp_path / "payments.jsonl")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(budget, "_write", full)
    with pytest.raises(ToolError, match="budget: .*No space"), budget.hold("p", 0.4):
        raise AssertionError("what cannot be written down is not asked for")
    with pytest.raises(SearchStopped, match="cannot be written to .*payments.jsonl: No space"):
        budget.check()


def test_a_ledger_that_is_begun_anew_under_a_run_hides_no_payment(tmp_path):
    ledger = tmp_path / "payments.jsonl"
    budget = Budget(1.0, ledger)
    with budget.hold("a provider with a long name", 0.3):
        budgets.current().sent()
    ledger.unlink()
    for _ in range(2):
        with budget.hold("p", 0.3):
            budgets.current().sent()
    assert budget.spent == pytest.approx(0.9)
    with pytest.raises(ToolError, match="budget"), budget.hold("p", 0.3):
        raise AssertionError("there is no money for it")


@pytest.mark.parametrize("price", [-0.001, float("nan"), float("inf")])
def test_prices_with_which_no_budget_could_be_kept(price):
    configs = (
        SerperConfig, SerpApiConfig, JinaSearchConfig, SearxngConfig, RetrieverConfig,
    )  # fmt: skip
    for make in configs:
        with pytest.raises(ValueError, match=r"web\.\w+\.price must be a number of US dollars"):
            make(price=price)
    for name in ("page_price", "summary_price"):
        with pytest.raises(ValueError, match=f"web.{name} must be a number"):
            WebConfig(**{name: price})
    with pytest.raises(ValueError, match="budget.money must be"):
        budgets.BudgetConfig(price)
    with pytest.raises(ValueError, match="lens_credits must be at least 1, not 0"):
        SerperConfig(lens_credits=0)

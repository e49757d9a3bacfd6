"""One live call for equal requests; failures are not kept; the budget is never overrun."""

import asyncio
import json
import sqlite3
import time

import pytest

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.budget import Budget, BudgetConfig, BudgetSpent, SearchStopped
from mmsr_jax.tools.hits import Found, Hit
from mmsr_jax.tools.recorded import Recorded, Recorder, Request
from mmsr_jax.tools.store import Store
from mmsr_jax.types import ResultItem, ToolCall

ASKED = Request("links", "serper", {"query": "Nepal"})
HITS = (Hit("Nepal", "https://np", "A country.", picture=b"png"), Hit("Népal 🇳🇵 \ud800"))
CALL = ToolCall("text_search", "capital of Nepal", b"picture", "What is it?")


class Service:
    """Counts its calls; answers, or raises what it is told to."""

    def __init__(self, *answers, wait=0.0):
        self.answers, self.calls, self.wait = list(answers), 0, wait

    async def __call__(self):
        self.calls += 1
        await asyncio.sleep(self.wait)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "s.db")
    yield made
    made.close()


def test_the_second_time_the_store_answers(store):
    service = Service(Found(HITS, cost=0.25))

    async def main():
        recorder = Recorder(store)
        first = await recorder.ask(ASKED, service, 0.25)
        second = await recorder.ask(ASKED, service, 0.25)
        assert (first.source, first.paid, second.source, second.paid) == ("live", 0.25, "store", 0)
        assert first.hits == second.hits == HITS and second.cost == 0.25
        assert second.seconds == first.seconds
        assert recorder.counters() == {
            "live": 1, "from_store": 1, "joined": 0, "recorded": 1, "failed": 0,
            "missed": 0, "unrecorded": 0,
            "paid": 0.25, "paid_calls": 1,
        }  # fmt: skip

    asyncio.run(main())
    assert service.calls == 1 and store.check() == []


def test_equal_calls_in_flight_are_one(store):
    service = Service(Found(HITS, cost=0.25), wait=0.05)

    async def main():
        recorder = Recorder(store)
        other = Request("links", "serper", {"query": "Niger"})
        found = await asyncio.gather(
            *(recorder.ask(ASKED, service, 0.25) for _ in range(8)), recorder.ask(other, service)
        )
        assert service.calls == 2
        assert [f.source for f in found] == ["live"] + ["joined"] * 7 + ["live"]
        assert sum(f.paid for f in found[:8]) == 0.25 and all(f.hits == HITS for f in found)
        assert not recorder._flights  # nothing is left behind

    asyncio.run(main())


def test_all_who_joined_a_failure_hear_of_it_and_the_next_asks_again(store):
    service = Service(ToolError("server_error"), Found(HITS), wait=0.02)

    async def main():
        recorder = Recorder(store)
        asks = [recorder.ask(ASKED, service) for _ in range(4)]
        results = await asyncio.gather(*asks, return_exceptions=True)
        assert [str(r) for r in results] == ["server_error"] * 4 and service.calls == 1
        assert (await recorder.ask(ASKED, service)).hits == HITS

    asyncio.run(main())


def test_who_joined_late_has_time_of_its_own(store):
    service = Service(ToolError("timeout"), Found(HITS, cost=0.25), wait=0.02)

    async def main():
        recorder = Recorder(store)
        asks = [recorder.ask(ASKED, service, 0.25) for _ in range(4)]
        results = await asyncio.gather(*asks, return_exceptions=True)
        assert str(results[0]) == "timeout" and service.calls == 2
        assert [r.source for r in results[1:]] == ["live", "joined", "joined"]
        assert all(r.hits == HITS for r in results[1:]) and not recorder._flights
        slow = Service(ToolError("timeout"), wait=0.02)
        asks = [recorder.ask(Request("links", "serper", {}), slow) for _ in range(4)]
        results = await asyncio.gather(*asks, return_exceptions=True)
        assert [str(r) for r in results] == ["timeout"] * 4 and slow.calls == 2

    asyncio.run(main())


def test_a_store_that_cannot_write_costs_no_answer(store, monkeypatch, caplog):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    async def main():
        recorder = Recorder(store)
        monkeypatch.setattr(Store, "put", full)
        found = await recorder.ask(ASKED, Service(Found(HITS, cost=0.25)), 0.25)
        assert found.hits == HITS and found.paid == 0.25
        counters = recorder.counters()
        assert (counters["recorded"], counters["unrecorded"], counters["failed"]) == (0, 1, 0)

    asyncio.run(main())
    assert "disk is full" in caplog.text


def test_a_replay_counts_what_is_missing_and_stops_where_nothing_is_there(store, caplog):
    async def ask(recorder, n):
        with pytest.raises(ToolError, match="not_recorded"):
            await recorder.ask(Request("links", "serper", {"q": n}), Service(AssertionError()))

    async def main():
        await Recorder(store).ask(ASKED, Service(Found(HITS)))
        right, wrong = Recorder(store, "replay"), Recorder(store, "replay")
        await right.ask(ASKED, Service(AssertionError()))
        for n in range(20):
            wrong.check()
            await ask(right, n)
            await ask(wrong, n)
        right.check()
        assert right.counters()["missed"] == 20 and right.counters()["from_store"] == 1
        with pytest.raises(SearchStopped, match="none of the first 20 requests is recorded in"):
            wrong.check()

    asyncio.run(main())
    assert "not recorded: 10 requests, and 1 were" in caplog.text


def test_a_call_outlives_the_one_who_gave_up_on_it(store):
    service = Service(Found(HITS, cost=0.25), wait=0.1)

    async def main():
        recorder = Recorder(store)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(recorder.ask(ASKED, service, 0.25), 0.01)
        await asyncio.sleep(0.2)
        assert (await recorder.ask(ASKED, service, 0.25)).source == "store"

    asyncio.run(main())
    assert service.calls == 1


def test_live_asks_always_and_replay_never(store):
    async def main():
        live = Recorder(store, "live")
        assert (await live.ask(ASKED, Service(Found(HITS[:1])))).hits == HITS[:1]
        assert (await live.ask(ASKED, Service(Found(HITS)))).hits == HITS
        replay = Recorder(store, "replay")
        nobody = Service(AssertionError("asked in a replay"))
        assert (await replay.ask(ASKED, nobody)).hits == HITS
        with pytest.raises(ToolError, match="not_recorded: links by serper"):
            await replay.ask(Request("links", "serper", {"query": "Niger"}), nobody)
        assert nobody.calls == 0

    asyncio.run(main())
    with pytest.raises(ValueError, match="needs a store"):
        Recorder(None, "replay")


def test_an_answer_made_smaller_by_a_failure_is_kept_for_replays_only(store):
    service = Service(Found(HITS[:1], complete=False), Found(HITS))

    async def main():
        recorder = Recorder(store)
        assert not (await recorder.ask(ASKED, service)).complete
        part = await Recorder(store, "replay").ask(ASKED, service)
        assert part.hits == HITS[:1] and not part.complete and service.calls == 1
        assert (await recorder.ask(ASKED, service)).hits == HITS and service.calls == 2

    asyncio.run(main())


class Local:
    name = "text_search"

    def __init__(self, answer):
        self.answer, self.calls = answer, 0

    async def run(self, call):
        self.calls += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_local_tool_can_be_recorded_too(store):
    items = (ResultItem("Nepal", "np", "text", b"thumb"), ResultItem("Niger"))

    async def main():
        tool = Local(items)
        recorded = Recorded(tool, Recorder(store), {"index": "v1"})
        for _ in range(2):
            assert await recorded.run(CALL) == items
        assert tool.calls == 1
        replayed = Recorded(Local(AssertionError()), Recorder(store, "replay"), {"index": "v1"})
        assert await replayed.run(CALL) == items
        changed = Recorded(Local(AssertionError()), Recorder(store, "replay"), {"index": "v2"})
        with pytest.raises(ToolError, match="not_recorded"):
            await changed.run(CALL)

    asyncio.run(main())


def test_that_there_is_nothing_is_kept_and_a_failure_is_not(store):
    async def main():
        nothing = Local(ToolError("no_results"))
        recorded = Recorded(nothing, Recorder(store))
        for _ in range(2):
            with pytest.raises(ToolError, match="^no_results$"):
                await recorded.run(CALL)
        assert nothing.calls == 1
        broken = Local(ToolError("server_error"))
        recorded = Recorded(broken, Recorder(store), {"other": 1})
        for _ in range(2):
            with pytest.raises(ToolError, match="server_error"):
                await recorded.run(CALL)
        assert broken.calls == 2

    asyncio.run(main())
    assert store.summary()["records"] == 1


def test_a_request_is_the_parts_it_depends_on():
    recorder = Recorder()
    text = Recorded(Local(()), recorder)
    other = ToolCall("text_search", CALL.query, b"another picture", CALL.question)
    assert text.request(CALL).key == text.request(other).key
    asked = ToolCall("text_search", CALL.query, CALL.image, "Another question?")
    assert text.request(CALL).key != text.request(asked).key
    tool = Local(())
    tool.name = "image_search"
    image = Recorded(tool, recorder)
    assert image.request(CALL).key == image.request(asked).key != image.request(other).key
    assert "picture" not in image.request(CALL).text


def test_the_budget_is_never_overrun_and_says_when_it_stops(tmp_path):
    ledger = tmp_path / "spend.jsonl"
    budget = Budget(1.0, ledger)
    service = Service(Found(HITS, cost=0.3), wait=0.02)

    async def main():
        recorder = Recorder(budget=budget)
        asks = [
            recorder.ask(Request("links", "serper", {"query": str(n)}), service, 0.3)
            for n in range(6)
        ]
        results = await asyncio.gather(*asks, return_exceptions=True)
        refused = [r for r in results if isinstance(r, ToolError)]
        assert len(refused) == 3 and all(r.kind == "budget" for r in refused)
        free = await recorder.ask(ASKED, Service(Found(HITS)))  # what costs nothing goes on
        assert free.hits == HITS

    budget.check()
    asyncio.run(main())
    assert service.calls == 3 and budget.spent == pytest.approx(0.9)
    with pytest.raises(
        BudgetSpent, match=r"1 US dollars.*0\.9000 in calls under way.*a call to serper costs"
    ):
        budget.check()
    with ledger.open("ab") as file:
        file.write(b'{"time": 1, "provi')  # cut by a kill
    again = Budget(1.5, ledger)
    assert again.spent == pytest.approx(0.9) and not again.stopped
    with again.hold("serper", 0.3):
        pass
    assert Budget(1.5, ledger).spent == pytest.approx(1.2)
    for line in ledger.read_text().split("\n"):
        if line.endswith("}"):
            assert set(json.loads(line)) == {"time", "provider", "cost"}


def test_a_provider_that_always_refuses_stops_the_run():
    async def ask(recorder, error, times, kind="links"):
        for n in range(times):
            with pytest.raises(ToolError):
                await recorder.ask(Request(kind, "serper", {"q": n}), Service(ToolError(error)))

    async def main():
        recorder = Recorder()
        await ask(recorder, "quota", 19)
        await recorder.ask(ASKED, Service(Found(())))  # it answers: nothing is wrong
        await ask(recorder, "unauthorized", 19)
        await ask(recorder, "timeout", 40)  # says nothing about us
        await ask(recorder, "unauthorized", 40, "page")  # nor does a page
        recorder.check()
        await ask(recorder, "quota", 1)
        with pytest.raises(SearchStopped, match=r"serper has refused 20 calls in a row \(quota"):
            recorder.check()

    asyncio.run(main())


def test_processes_of_one_run_share_its_money(tmp_path):
    one, other = Budget(1.0, tmp_path / "p"), Budget(1.0, tmp_path / "p")
    for budget in (one, other, one):
        with budget.hold("serper", 0.3):
            pass
    with pytest.raises(ToolError, match="budget"), other.hold("serper", 0.3):
        raise AssertionError("it must not be called")
    assert one.spent == pytest.approx(0.9) and (one.calls, other.calls) == (2, 1)


def test_the_price_is_what_the_service_said_it_was():
    budget = Budget(1.0)
    asyncio.run(Recorder(budget=budget).ask(ASKED, Service(Found(HITS, cost=0.1)), 0.9))
    assert budget.spent == 0.1


def test_no_negative_money():
    with pytest.raises(ValueError, match="not -1"):
        BudgetConfig(-1)


def test_ttl_asks_again(store):
    service = Service(Found(HITS[:1]), Found(HITS))

    async def main():
        recorder = Recorder(store, ttl=0.05)
        assert (await recorder.ask(ASKED, service)).hits == HITS[:1]
        assert (await recorder.ask(ASKED, service)).source == "store"
        time.sleep(0.06)
        assert (await recorder.ask(ASKED, service)).hits == HITS

    asyncio.run(main())

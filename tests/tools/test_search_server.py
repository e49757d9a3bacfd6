"""The server's answers, its limits, and what hostile requests get."""

import asyncio
import base64
import io
import json
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from mmsr_jax.tools.local import LocalImageIndex, LocalTextIndex, Passage, PictureEntry
from mmsr_jax.tools.server import run as server_run
from mmsr_jax.tools.server.app import Limits, ServerConfig, application
from mmsr_jax.tools.server.metrics import SECONDS, Metrics
from mmsr_jax.tools.server.run import listen

PASSAGES = [
    Passage("Nepal", "np", "The capital of Nepal is Kathmandu."),
    Passage("Niger\n(state)", "ne", "The capital of Niger is Niamey."),
]


def png(*colours, size=(60, 40)) -> bytes:
    stripes = np.repeat(np.array([colours], np.uint8), size[0] // len(colours), axis=1)
    out = io.BytesIO()
    Image.fromarray(np.repeat(stripes, size[1], axis=0)).save(out, "PNG")
    return out.getvalue()


RED, WHITE, GREEN, BLUE = (200, 20, 30), (255, 255, 255), (0, 120, 60), (0, 40, 160)
FLAGS = {"IT": png(GREEN, WHITE, RED), "FR": png(BLUE, WHITE, RED)}


def app(**config):
    pictures = LocalImageIndex(
        (flag, PictureEntry(name, name.lower(), b"small " + name.encode()))
        for name, flag in FLAGS.items()
    )
    return application(LocalTextIndex(PASSAGES), pictures, ServerConfig(**config))


def ask(made, *requests):
    """Answers to (method, path, arguments) one after another, over ASGI."""

    async def talk():
        transport = httpx.ASGITransport(made)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return [await client.request(m, path, **more) for m, path, more in requests]

    return asyncio.run(talk())


def post(made, path, **more):
    (answer,) = ask(made, ("POST", path, more))
    return answer


def test_retrieve_speaks_search_r1():
    body = {"queries": ["capital of Niger", "zzz", "Nepal"], "topk": 1, "return_scores": True}
    answer = post(app(), "/retrieve", json=body)
    assert answer.status_code == 200
    first, nothing, third = answer.json()["result"]
    assert nothing == [] and len(first) == len(third) == 1
    assert first[0]["score"] > 0
    # Search-R1's clients cut the contents after the first line: it has to be the title.
    assert first[0]["document"] == {
        "id": "ne",
        "contents": '"Niger (state)"\nThe capital of Niger is Niamey.',
        "title": "Niger\n(state)",
        "link": "ne",
        "text": "The capital of Niger is Niamey.",
    }
    plain = post(app(), "/retrieve", json={"queries": ["capital of Niger"]}).json()["result"]
    assert [document["id"] for document in plain[0]] == ["ne", "np"]


def test_image_by_bytes_and_by_base64():
    made, dark = app(), png((0, 30, 110), (180, 180, 180), (150, 15, 20))
    by_bytes = post(made, "/image?topk=1", content=dark)
    found = by_bytes.json()["result"]
    assert [entry["title"] for entry in found] == ["FR"] and found[0]["link"] == "fr"
    assert base64.b64decode(found[0]["thumbnail"]) == b"small FR" and found[0]["score"] > 0
    body = {"image": base64.b64encode(dark).decode(), "topk": 1}
    assert post(made, "/image", json=body).json() == by_bytes.json()


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/retrieve", b"", 400, "bad_json"),
        ("/retrieve", b"[" * 100_000, 400, "bad_json"),
        ("/retrieve", b"\xff\xfe{}", 400, "bad_json"),
        ("/retrieve", b'["q"]', 400, "bad_json"),
        ("/retrieve", b"{}", 422, "bad_queries"),
        ("/retrieve", b'{"queries": []}', 422, "bad_queries"),
        ("/retrieve", b'{"queries": "one"}', 422, "bad_queries"),
        ("/retrieve", b'{"queries": [1]}', 422, "bad_queries"),
        ("/retrieve", json.dumps({"queries": ["q"] * 257}).encode(), 422, "bad_queries"),
        ("/retrieve", json.dumps({"queries": ["q" * 10_001]}).encode(), 422, "bad_queries"),
        ("/retrieve", b'{"queries": ["q"], "topk": 0}', 422, "bad_topk"),
        ("/retrieve", b'{"queries": ["q"], "topk": 101}', 422, "bad_topk"),
        ("/retrieve", b'{"queries": ["q"], "topk": true}', 422, "bad_topk"),
        ("/retrieve", b'{"queries": ["q"], "topk": 1e999}', 422, "bad_topk"),
        ("/retrieve", b'{"queries": ["q"], "return_scores": 1}', 422, "bad_return_scores"),
        ("/retrieve", b" " * 1_000_001, 413, "body_too_large"),
        ("/image", b"", 422, "bad_image"),
        ("/image", b"%!PS-Adobe-3.0", 422, "bad_image"),
        ("/image", FLAGS["IT"][:60], 422, "bad_image"),
        ("/image?topk=-1", FLAGS["IT"], 422, "bad_topk"),
        ("/image?topk=%C2%B2", FLAGS["IT"], 422, "bad_topk"),
        ("/image", b" " * 20_000_001, 413, "body_too_large"),
        ("/nowhere", b"", 404, "not_found"),
        ("/health", b"", 405, "method_not_allowed"),
    ],
)
def test_refusals_have_names(path, body, status, kind):
    answer = post(app(), path, content=body)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (status, kind)
    assert len(answer.json()["error"]["message"]) < 300


@pytest.mark.parametrize("image", ["no base64!", 7, None, "", base64.b64encode(b"x").decode()])
def test_pictures_in_json_are_checked(image):
    answer = post(app(), "/image", json={"image": image})
    assert (answer.status_code, answer.json()["error"]["kind"]) == (422, "bad_image")


def test_a_body_without_end_is_cut_off():
    sent = []

    async def endless():
        while True:
            sent.append(1)
            yield b" " * 100_000

    async def talk():
        transport = httpx.ASGITransport(app())
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/retrieve", content=endless())

    assert asyncio.run(talk()).status_code == 413
    assert len(sent) < 20


def test_queries_of_operators_never_fail():
    queries = ['"', "NOT (", "a" * 10_000, "\ud800", "NEAR(x, 3", "title:x", "\x00", "*", ""]
    body = json.dumps({"queries": queries, "return_scores": True})
    assert post(app(), "/retrieve", content=body.encode()).json() == {"result": [[]] * 9}


def test_an_index_of_one_kind_says_so():
    texts = application(LocalTextIndex(PASSAGES), None)
    answer = post(texts, "/image", content=FLAGS["IT"])
    assert (answer.status_code, answer.json()["error"]["kind"]) == (404, "no_pictures")
    pictures = application(None, LocalImageIndex([(FLAGS["IT"], PictureEntry("a", "b", b""))]))
    answer = post(pictures, "/retrieve", json={"queries": ["x"]})
    assert (answer.status_code, answer.json()["error"]["kind"]) == (404, "no_documents")


class Slow:
    """A text index that waits, or fails."""

    def __init__(self):
        self.go, self.asked = threading.Event(), 0

    def __len__(self):
        return 1

    def scored(self, query, topk):
        self.asked += 1
        if query == "fail":
            raise KeyError("broken")
        self.go.wait(10)
        return []


def test_deadline_overload_and_failure_end_in_named_errors():
    slow = Slow()
    made = application(slow, None, ServerConfig(threads=1, waiting=2, deadline=0.5))
    wait = {"json": {"queries": ["wait", "never begun"]}}

    async def talk():
        transport = httpx.ASGITransport(made)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            posts = [asyncio.create_task(client.post("/retrieve", **wait)) for _ in range(3)]
            done = await asyncio.gather(*posts)
            slow.go.set()
            failed = await client.post("/retrieve", json={"queries": ["fail"]})
            return done, failed, await client.get("/health"), await client.get("/metrics")

    done, failed, health, metrics = asyncio.run(talk())
    kinds = sorted(answer.json()["error"]["kind"] for answer in done)
    assert kinds == ["overloaded", "timeout", "timeout"]
    (full,) = (answer for answer in done if answer.status_code == 503)
    assert full.headers["Retry-After"] == "1"
    assert (failed.status_code, failed.json()["error"]["kind"]) == (500, "failed")
    assert "broken" not in failed.text
    assert health.json()["status"] == "ok"
    assert slow.asked == 2  # what waited behind its deadline was never begun
    for line in (
        'mmsr_search_requests_total{path="/retrieve",status="504"} 2',
        'mmsr_search_errors_total{path="/retrieve",kind="overloaded"} 1',
        'mmsr_search_request_seconds_count{path="/retrieve"} 4',
        "mmsr_search_in_flight 0",
        "mmsr_search_passages 1",
    ):
        assert line in metrics.text.splitlines()


class Counting:
    """A picture index that counts how many search it at a time."""

    def __init__(self):
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def __len__(self):
        return 1

    def scored(self, picture, topk):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.02)
        with self.lock:
            self.now -= 1
        return []


def test_pictures_have_few_threads_and_bodies_a_limit_in_all():
    counting = Counting()
    config = ServerConfig(
        threads=16, picture_threads=2, body_bytes=25_000, limits=Limits(picture_bytes=10_000)
    )
    made = application(None, counting, config)

    async def talk():
        transport = httpx.ASGITransport(made)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:

            async def image(size):
                return (await client.post("/image", content=b"x" * size)).json()

            few = await asyncio.gather(*(image(1000) for _ in range(12)))
            many = await asyncio.gather(*(image(10_000) for _ in range(4)))
            return few, many, await image(10_000)

    few, many, after = asyncio.run(talk())
    assert few == [{"result": []}] * 12 and after == {"result": []}
    assert counting.most == 2
    kinds = [answer.get("error", {}).get("kind", "") for answer in many]
    assert sorted(kinds) == ["", "", "overloaded", "overloaded"]
    with pytest.raises(ValueError, match="body_bytes 1000 .23333 or more"):
        ServerConfig(body_bytes=1000, limits=Limits(picture_bytes=10_000))
    with pytest.raises(ValueError, match="picture_threads 0"):
        ServerConfig(picture_threads=0)


def test_the_server_limits_connections(monkeypatch):
    seen = {}

    def run(server, sockets):
        seen["limit"] = server.config.limit_concurrency

    monkeypatch.setattr(server_run.uvicorn.Server, "run", run)
    with listen("127.0.0.1", 0) as listening:
        server_run.serve(app(), listening)
    assert seen["limit"] == server_run.CONNECTIONS


def test_metrics_are_what_prometheus_reads():
    metrics = Metrics()
    for seconds in (0.0001, 0.003, 99.0):
        metrics.done("/image", 200, seconds)
    metrics.done("/image", 422, SECONDS[0], "bad_image")
    metrics.asked("/image", 4)
    lines = metrics.text({"pictures": 5}).splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    bucket = 'mmsr_search_request_seconds_bucket{path="/image",le="%s"}'
    assert [values[bucket % limit] for limit in (0.001, 0.0025, 0.005, 10.0, "+Inf")] == list(
        "22334"
    )
    assert values['mmsr_search_queries_total{path="/image"}'] == "4"
    assert values["mmsr_search_pictures"] == "5"
    named = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    bare = {name.partition("{")[0] for name in values}
    for ending in ("_bucket", "_sum", "_count"):
        bare = {name.removesuffix(ending) if "seconds" in name else name for name in bare}
    assert bare == named


def test_listening_mistakes_name_the_cure():
    with listen("127.0.0.1", 0) as taken, pytest.raises(ValueError, match="another --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match="port 70000 is not in"):
        listen("127.0.0.1", 70_000)
    with pytest.raises(ValueError, match="cannot listen on 192.0.2.1"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize("field", [{"threads": -1}, {"waiting": 0}, {"deadline": 0}])
def test_wrong_settings(field):
    with pytest.raises(ValueError, match="threads"):
        ServerConfig(**field)
    with pytest.raises(ValueError, match=r"in 1\.\.100"):
        Limits(default_topk=101)


def test_closing_ends_the_pool_and_the_index():
    closed = []
    made = application(LocalTextIndex(PASSAGES), None, close=lambda: closed.append(1))

    async def live():
        async with made.router.lifespan_context(made):
            assert not closed

    asyncio.run(live())
    assert closed == [1]
    answer = post(made, "/retrieve", json={"queries": ["x"]})
    assert answer.status_code == 500

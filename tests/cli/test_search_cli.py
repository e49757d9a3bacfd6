"""`mmsr search`: who answered, from where, for how much; and the store from the shell."""

import io
import json
import pickle
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmsr_jax.cli import blocks
from mmsr_jax.cli.main import main


class Serper(BaseHTTPRequestHandler):
    """Serper's two searches, as serper.dev documents them."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["X-API-KEY"], body))
        organic = [
            {"title": "Nepal\x1b[31m", "link": "https://np.example", "snippet": "A country."}
        ]
        content = {"searchParameters": body, "credits": 2}
        content["organic"] = organic if body["q"] != "nothing" else []
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def serper(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "sk-shell-secret")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Serper)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def shown(capsys, words):
    assert main(words) == 0
    return capsys.readouterr().out


def test_text_by_a_provider_live_then_from_the_store_then_replayed(serper, tmp_path, capsys):
    store = str(tmp_path / "calls.db")
    words = ["search", "text", "nepal", "--provider", "serper", "--url", serper.url, "--unread",
             "--store", store]  # fmt: skip
    lines = shown(capsys, words).splitlines()
    assert lines[:2] == ["1. Nepal [31m  https://np.example", "   A country."]
    assert lines[2].startswith("serper, live, ") and lines[2].endswith("$0.0020 paid")
    assert serper.asked == [("/search", "sk-shell-secret", {"q": "nepal", "gl": "us", "hl": "en"})]
    last = shown(capsys, words).splitlines()[-1]
    assert "serper, from the store, " in last and last.endswith("($0.0020 when live)")
    record = json.loads(shown(capsys, [*words, "--replay", "--json"]))
    assert (record["source"], record["cost"], record["paid"]) == ("store", 0.002, 0.0)
    assert record["items"][0]["text"] == "A country." and len(serper.asked) == 1
    other = [*words, "--replay"]
    other[2] = "niger"
    assert main(other) == 2
    assert "mmsr search: text_search: not_recorded" in capsys.readouterr().err
    assert len(serper.asked) == 1
    for file in tmp_path.iterdir():
        assert b"sk-shell-secret" not in file.read_bytes()


def test_that_there_is_nothing_has_its_price_and_is_kept_too(serper, tmp_path, capsys):
    words = ["search", "text", "nothing", "--provider", "serper", "--url", serper.url, "--unread",
             "--store", str(tmp_path / "calls.db")]  # fmt: skip
    lines = shown(capsys, words).splitlines()
    assert lines[0] == "no results" and lines[1].startswith("serper, live, ")
    assert lines[1].endswith("$0.0020 paid")
    assert "serper, from the store, " in shown(capsys, words) and len(serper.asked) == 1


def test_what_a_store_holds_and_its_way_to_parquet_and_back(serper, tmp_path, capsys):
    store, parquet = str(tmp_path / "calls.db"), str(tmp_path / "calls.parquet")
    words = ["search", "text", "nepal", "--provider", "serper", "--url", serper.url, "--unread",
             "--store", store]  # fmt: skip
    for _ in range(3):
        shown(capsys, words)
    out = shown(capsys, ["search", "store", store, "--check", "--export", parquet])
    assert "2 hits (50.0 %), 2 misses, $0.0020 paid" in out  # the tool's call, and its links'
    assert "no damage" in out and "exported: 2" in out
    other = str(tmp_path / "other.db")
    told = json.loads(shown(capsys, ["search", "store", other, "--import", parquet, "--json"]))
    assert (told["imported"], told["already_there"], told["records"]) == (2, 0, 2)
    told = json.loads(shown(capsys, ["search", "store", other, "--import", parquet, "--json"]))
    assert (told["imported"], told["already_there"]) == (0, 2)
    words[-1] = other
    assert "from the store" in shown(capsys, [*words, "--replay"]) and len(serper.asked) == 1


def test_the_embedded_world_can_be_recorded(tmp_path, capsys):
    store = str(tmp_path / "calls.db")
    words = ["search", "text", "capital of Nepal", "--count", "1", "--store", store]
    first = shown(capsys, words).splitlines()
    assert first[1] == "   The capital of Nepal is Kathmandu." and "local, live" in first[2]
    again = shown(capsys, words).splitlines()
    assert again[:2] == first[:2] and "local, from the store" in again[2]


def picture():
    out = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(out, "PNG")
    return out.getvalue()


def test_fvqa_from_the_shell(tmp_path, capsys):
    title, shown_ = "tool_returned_web_title_list", "tool_returned_images_urls"
    cache = {"fvqa_train_0": {title: ["Nepal"], shown_: [Image.open(io.BytesIO(picture()))]}}
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(cache))
    images = [[{"bytes": b"the question's picture", "path": None}]]
    pq.write_table(
        pa.table({"data_id": ["fvqa_train_0"], "images": images}), tmp_path / "q.parquet"
    )
    store = str(tmp_path / "calls.db")
    words = ["search", "store", store, "--fvqa", str(tmp_path / "c.pkl")]
    assert main(words) == 2
    assert "--fvqa and --questions belong together" in capsys.readouterr().err
    told = json.loads(shown(capsys, [*words, "--questions", str(tmp_path / "q.parquet"), "--json"]))
    assert told["fvqa"]["questions"] == told["fvqa"]["embedded"] == told["records"] == 1
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    words[4] = str(tmp_path / "evil.pkl")
    assert main([*words, "--questions", str(tmp_path / "q.parquet")]) == 2
    assert "os.system has no place" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text", "a", "--provider", "serper"], "environment variable SERPER_API_KEY"),
        (["text", "a", "--provider", "jina"], "environment variable JINA_API_KEY"),
        (["image", __file__, "--provider", "serpapi"], "needs one uploader"),
        (["text", "a", "--url", "http://x"], "give --provider too"),
        (["text", "a", "--provider", "searxng", "--url", "x"], "the address of SearXNG must be"),
        (["text", "a", "--replay"], "'replay', but store.path names no store"),
        (["text", "a", "--provider", "bing"], "invalid choice: 'bing'"),
        (["store", "nowhere.db"], "nowhere.db: there is no store"),
        (["store", __file__], "is no store of search calls"),
        (["store", "new.db", "--import", __file__], "is no parquet file"),
    ],
)
def test_a_mistake_ends_in_one_line_and_2(words, message, tmp_path, monkeypatch, capsys):
    for name in ("SERPER_API_KEY", "JINA_API_KEY", "SERPAPI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["search", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_pictures_as_half_blocks(monkeypatch):
    out = io.BytesIO()
    image = Image.new("RGB", (2, 3), (1, 2, 3))
    image.putpixel((0, 1), (9, 8, 7))
    image.save(out, "PNG")
    above, below = "\x1b[38;2;1;2;3m", "\x1b[48;2;{}m"
    assert blocks.lines(out.getvalue()) == [
        above + below.format("9;8;7") + "▀" + above + below.format("1;2;3") + "▀" + "\x1b[0m",
        (above + "▀") * 2 + "\x1b[0m",
    ]
    assert blocks.lines(b"no picture") == []
    wide = io.BytesIO()
    Image.new("RGB", (4000, 100)).save(wide, "PNG")
    assert len(blocks.lines(wide.getvalue())) == 1
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", type("Terminal", (), {"isatty": lambda self: True})())
    assert blocks.shows_colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not blocks.shows_colours()

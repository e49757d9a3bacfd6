"""`mmsr search index` and `mmsr search serve`, as a shell sees them."""

import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest
from PIL import Image

from mmsr_jax.cli.main import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/nepal.txt").write_text("The capital of Nepal is Kathmandu.")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "source/red.png")
    (tmp_path / "source/torn.png").write_bytes(b"torn")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", ["fts", "tantivy"])
def test_index_says_what_is_in_it(folder, capsys, text):
    assert main(["search", "index", "source", "out", "--text", text]) == 0
    shown = capsys.readouterr().out
    assert f"1 passages by {text}" in shown and "1 pictures by hash, exact search" in shown
    assert "left out: 1 x broken picture" in shown
    assert main(["search", "index", "source", "out", "--text", text]) == 0
    assert "out is up to date" in capsys.readouterr().out


def test_an_index_is_asked_without_a_server(folder, capsys):
    main(["search", "index", "source", "out"])
    capsys.readouterr()
    assert main(["search", "text", "capital of Nepal", "--index", "out"]) == 0
    assert "The capital of Nepal is Kathmandu." in capsys.readouterr().out
    assert main(["search", "image", "source/red.png", "--index", "out", "--json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)["items"]
    assert item["title"] == "red" and item["thumbnail"]


def test_the_flags_world_as_files_indexed_and_asked(folder, capsys):
    assert main(["data", "corpus", "flags", "corpus"]) == 0
    assert "sentences and 182 pictures in corpus" in capsys.readouterr().out
    assert main(["search", "index", "corpus", "flags-index"]) == 0
    shown = capsys.readouterr().out
    assert "182 pictures by hash" in shown and "left out" not in shown
    assert main(["search", "image", "corpus/pictures/NP.png", "--index", "flags-index"]) == 0
    assert capsys.readouterr().out.startswith("1. Nepal  flags:NP")
    assert main(["data", "corpus", "flags", "corpus"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == ("mmsr data: corpus is there and not empty: choose another folder, or remove it")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["text", "nepal", "--index", "nowhere"], "nowhere is no index"),
        (["text", "nepal", "--index", "source"], "source is no index"),
        (["text", "nepal", "--index", "source", "--provider", "flags"], "give one"),
        (["index", "nowhere", "out"], "nowhere is neither a folder nor a .parquet file"),
        (["index", "source", "source"], "source is there and is no index"),
        (["index", "source", "out", "--text", "lucene"], "no text back end 'lucene'"),
        (["index", "source", "out", "--pictures", "qwen2_5_vl"], "need --weights"),
        (["index", "source", "out", "--pictures", "siglip"], "pictures by siglip need --weights"),
        (["index", "source", "out", "--pictures", "clip", "--weights", "x"], "no folder x"),
        (["index", "source", "out", "--pictures", "siglip2"], "siglip2 (NaFlex) are not supported"),
        (["index", "source", "out", "--weights", "x"], "hash need no weights"),
        (["index", "source", "out", "--pictures", "eyes"], "no embedder 'eyes'"),
        (["serve", "nowhere"], "nowhere is no index"),
        (["serve", "source", "--port", "99999"], "port 99999 is not in"),
        (["serve", "flags", "--deadline", "0"], "deadline 0"),
        (["serve", "flags", "--prot", "1"], "did you mean --port?"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, words, said):
    assert main(["search", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and line.startswith("mmsr search: ")
    assert not (folder / "out").exists()


def test_a_damaged_index_is_one_line(folder, capsys):
    main(["search", "index", "source", "out"])
    (folder / "out/manifest.json").write_text("{")
    capsys.readouterr()
    assert main(["search", "serve", "out", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "manifest.json is damaged" in line and "build the index again" in line


def test_weights_that_have_moved_are_asked_for(folder, capsys):
    main(["search", "index", "source", "out"])
    manifest = json.loads((folder / "out/manifest.json").read_text())
    manifest["pictures"] |= {"embedder": "qwen2_5_vl", "weights": "gone"}
    (folder / "out/manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(["search", "serve", "out", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no folder 'gone'" in line and "--weights says where they are now" in line


def test_an_index_does_not_choose_what_is_downloaded(folder, capsys, monkeypatch):
    from mmsr_jax.embed import choose

    def fetch(*asked):
        raise AssertionError(f"would fetch {asked}")

    main(["search", "index", "source", "out"])
    manifest = json.loads((folder / "out/manifest.json").read_text())
    manifest["pictures"] |= {"embedder": "qwen2_5_vl", "weights": "stranger/weights"}
    (folder / "out/manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(choose, "embedder", fetch)
    capsys.readouterr()
    assert main(["search", "serve", "out", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no folder 'stranger/weights'" in line and "--weights says" in line


class Served:
    """`mmsr search serve` in a process of its own."""

    def __init__(self, *words):
        code = "import sys; from mmsr_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "search", "serve", *words, "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        )  # fmt: skip
        line = self.process.stdout.readline()
        assert line.startswith(f"serving {words[0]} on http://127.0.0.1:"), (
            self.process.stderr.read()
        )
        self.port = int(line.rpartition(":")[2])

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def stop(self, by=signal.SIGTERM):
        """The exit code and what stood on standard error."""
        self.process.send_signal(by)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


def test_an_index_over_a_real_socket(folder):
    assert main(["search", "index", "source", "out"]) == 0
    server = Served("out")
    try:
        assert json.loads(server.ask("GET", "/health")[1])["pictures"] == 1
        wrong = []

        def work():
            body = json.dumps({"queries": ["capital of Nepal"], "return_scores": True})
            status, answer = server.ask("POST", "/retrieve", body)
            found = json.loads(answer)["result"][0]
            if status != 200 or "Kathmandu" not in found[0]["document"]["contents"]:
                wrong.append(answer)
            status, answer = server.ask("POST", "/image", (folder / "source/red.png").read_bytes())
            if status != 200 or json.loads(answer)["result"][0]["title"] != "red":
                wrong.append(answer)

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        metrics = server.ask("GET", "/metrics")[1].decode()
        assert 'mmsr_search_requests_total{path="/retrieve",status="200"} 16' in metrics
        # A client that goes away in the middle of its body takes nothing with it.
        rude = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        rude.putrequest("POST", "/retrieve")
        rude.putheader("Content-Length", "1000")
        rude.endheaders(b"{")
        rude.close()
        assert server.ask("GET", "/health")[0] == 200
    finally:
        code, said = server.stop()
    assert said == "" and code in (0, -signal.SIGTERM)


def test_the_flags_world_over_a_real_socket(folder):
    from mmsr_jax.data.flags.world import World

    server = Served("flags", "--topk", "1")
    try:
        body = json.dumps({"queries": ["capital of Nepal"]})
        found = json.loads(server.ask("POST", "/retrieve", body)[1])["result"][0]
        assert "Kathmandu" in found[0]["text"]
        found = json.loads(server.ask("POST", "/image", World().flag("FR"))[1])["result"]
        assert [entry["title"] for entry in found] == ["France"]
    finally:
        server.stop(signal.SIGINT)

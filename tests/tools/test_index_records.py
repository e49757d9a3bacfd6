"""What a source gives, and what hostile files in it do: they are left out and counted."""

import base64
import html.parser
import io
import json

import pyarrow as arrow
import pytest
from PIL import Image
from pyarrow import parquet

from mmsr_jax.tools.index import records as records_lib
from mmsr_jax.tools.index.html_text import title_and_text
from mmsr_jax.tools.index.records import Record, Source, passages


def png(colour="red", size=(30, 20)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def records(path):
    source = Source(path)
    found = {record.id: record for record, _ in source.read() if record is not None}
    return found, dict(source.skipped)


def test_a_folder_of_every_kind(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/plain_text.txt").write_text("Brasília is a capital.")
    (tmp_path / "note.md").write_text("Before.\n# The  Title\nAfter.")
    (tmp_path / "page.html").write_text("<title>A &amp; B</title><p>one<p>two")
    (tmp_path / "red_flag.PNG").write_bytes(png())
    (tmp_path / "named.png").write_bytes(png())
    (tmp_path / "named.json").write_text('{"title": "Name", "link": "https://x.org/"}')
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    found, skipped = records(tmp_path)
    assert skipped == {}
    assert found["deep/plain_text.txt"] == Record(
        "deep/plain_text.txt", "plain text", "deep/plain_text.txt", "Brasília is a capital."
    )
    assert found["note.md"].title == "The  Title"
    assert (found["page.html"].title, found["page.html"].text) == ("A & B", "one\n\ntwo")
    assert (found["red_flag.PNG"].title, found["red_flag.PNG"].image) == ("red flag", png())
    assert (found["named.png"].title, found["named.png"].link) == ("Name", "https://x.org/")
    assert set(found) == {
        "deep/plain_text.txt", "note.md", "page.html", "red_flag.PNG", "named.png"
    }  # fmt: skip


def test_rows_of_jsonl(tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(png("blue"))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "inside.pic").write_bytes(png("green"))
    rows = [
        {"id": 7, "contents": '"Search R1"\nThe text.'},
        {"title": "T", "text": "x", "url": "u"},
        {"id": "file", "image": "inside.pic"},
        {"id": "base64", "image": base64.b64encode(png()).decode()},
        {"id": "escape", "text": "kept", "image": "../secret.png"},
        {"id": "surrogate", "text": "half \ud800 \x00"},
        {"id": "nothing"},
        [1, 2],
    ]
    lines = [json.dumps(row).encode() for row in rows] + [b"{broken", b"", b"[" * 100_000]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    found, skipped = records(folder)
    assert (found["7"].title, found["7"].text, found["7"].link) == ("Search R1", "The text.", "7")
    assert found["rows.jsonl:2"].link == "u"
    assert found["file"].image == png("green") and found["base64"].image == png()
    assert found["escape"].image is None and found["escape"].text == "kept"
    assert found["surrogate"].text == "half ? ?"
    assert skipped == {
        "row without text or picture": 1,
        "broken line of .jsonl": 3,
        "picture neither a file of the folder nor base64": 1,
    }


def test_parquet_with_pictures_as_bytes_or_structs(tmp_path):
    table = arrow.table({
        "id": ["a", "b", "c"],
        "title": ["A", None, "C"],
        "text": ["said", "", None],
        "image": [None, {"bytes": png(), "path": "x"}, {"bytes": None, "path": "y"}],
        "other": [1, 2, 3],
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "rows.parquet")
    found, skipped = records(tmp_path / "rows.parquet")
    assert found["a"].text == "said" and found["b"].image == png()
    assert skipped == {"row without text or picture": 1}
    source = Source(tmp_path)
    assert sum(size for _, size in source.read()) == source.size()
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:300])
    found, skipped = records(tmp_path)
    assert set(found) == {"a", "b"} and skipped["broken parquet file (ArrowInvalid)"] == 1


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    (tmp_path / "secret.txt").write_text("a secret")
    (tmp_path / "secret.json").write_text('{"title": "a secret"}')
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "own.txt").write_text("mine")
    (folder / "other.txt").symlink_to("own.txt")
    (folder / "out.txt").symlink_to(tmp_path / "secret.txt")
    for name in ("red", "blue"):
        (folder / f"{name}.png").write_bytes(png(name))
    (folder / "red.json").symlink_to(tmp_path / "secret.json")
    (folder / "blue.json").write_text(json.dumps({"title": "x" * records_lib.MAX_BESIDE_BYTES}))
    (folder / "in.jsonl").symlink_to(tmp_path / "secret.json")
    found, skipped = records(folder)
    assert set(found) == {"own.txt", "other.txt", "red.png", "blue.png"}
    assert (found["red.png"].title, found["blue.png"].title) == ("red", "blue")
    assert skipped == {
        "link that leads out of the folder": 2,
        "broken, large or linked .json beside a picture": 2,
    }


def test_pictures_in_parquet_are_few_at_a_time_and_not_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(records_lib, "MAX_FILE_BYTES", 1000)
    sizes = []
    batches = parquet.ParquetFile.iter_batches

    def watched(file, rows, columns):
        for batch in batches(file, rows, columns=columns):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", watched)
    images = [png()] * 40 + [b"x" * 1001]
    parquet.write_table(arrow.table({"image": images}), tmp_path / "rows.parquet")
    found, skipped = records(tmp_path / "rows.parquet")
    assert len(found) == 40 and max(sizes) == 16
    assert skipped == {"picture too large": 1, "row without text or picture": 1}


def test_mistakes_name_the_cure(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a .parquet file"):
        Source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no file of a known kind"):
        Source(tmp_path)
    parquet.write_table(arrow.table({"words": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="has columns words; text, contents or image needed"):
        records(tmp_path)


def test_the_fingerprint_sees_changes(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = Source(tmp_path).fingerprint()
    assert Source(tmp_path).fingerprint() == first
    (tmp_path / "a.txt").write_text("two!")
    assert Source(tmp_path).fingerprint() != first


def test_passages_end_with_sentences_and_never_grow_too_long():
    text = "One two three. Four five. " + "long " * 12 + "end. Last."
    cut = [passage.text for passage in passages(Record("i", "t", "l", text), 5)]
    assert cut[0] == "One two three. Four five."
    assert all(len(piece.split()) <= 5 for piece in cut)
    assert " ".join(cut).split() == text.split()
    assert not list(passages(Record("i", "t", "l", " \n "), 5))


@pytest.mark.parametrize(
    ("page", "title", "text"),
    [
        ("<h1>Head</h1><script>no()</script>yes", "Head", "Head\n\nyes"),
        ("<head><title>T</title><body>open head", "T", "open head"),
        ("plain < text & more", "", "plain < text & more"),
        ("<svg><title>no</title></svg><title>Yes</title>x", "Yes", "x"),
        ("before<![foo[bar]]>after", "", "before"),
        ("<" * 1000, "", "<" * 1000),
        ("<script>never closed", "", ""),
    ],
)
def test_html(page, title, text):
    assert title_and_text(page) == (title, text)


@pytest.mark.parametrize("open_tag", ["<a ", "<a b=", "<a b='", "<!--", "</", "<?"])
def test_a_page_of_open_tags_is_looked_at_once(open_tag, monkeypatch):
    """80 KB of "<a " took 36 seconds, and a megabyte would have taken hours."""
    seen = []
    for name in ("parse_starttag", "parse_endtag", "parse_html_declaration", "parse_pi"):
        plain = getattr(html.parser.HTMLParser, name)

        def counted(self, at, plain=plain):
            seen.append(len(self.rawdata) - at)
            return plain(self, at)

        monkeypatch.setattr(html.parser.HTMLParser, name, counted)
    page = "<p>before" + open_tag * 3000
    assert title_and_text(page) == ("", "before")
    assert sum(seen) < 5 * len(page)


def test_what_stands_before_a_last_ampersand_is_read():
    text = "word " * 1000 + "R&D"
    assert title_and_text(text) == ("", text)
    deep = "<svg>" * 300 + "</svg>" * 300 + "after"
    assert title_and_text(deep)[1] == "after"

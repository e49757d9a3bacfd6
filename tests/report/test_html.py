import base64
import html.parser
import json

import pytest

from mmsr_jax.report.html import picture_source, segments, web_link, write_report

PIXEL = base64.b64encode(b"\x89PNG...").decode()
EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}"


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside of style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._style = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_data(self, data):
        if not self._style:
            self.text += data

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def episode(number=0, category="known", searched=False, **changes):
    turns = [{"author": "model", "text": "<reason>r</reason><answer>Oslo</answer>"}]
    if searched:
        turns[0]["call"] = {"tool": "text_search", "query": "q"}
    record = {
        "example": f"example-{number}",
        "question": f"question {number}",
        "answers": ["Oslo"],
        "category": category,
        "image": PIXEL,
        "turns": turns,
        "ending": "answered",
        "reward": {"total": 0.91, "correct": True, "format": True, "searches": 0},
        "seconds": 1.0,
    }
    return record | changes


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def make(workdir, records=(), summary=None, metrics=(), config=None):
    (workdir / "trajectories").mkdir(exist_ok=True)
    (workdir / "trajectories" / "20.jsonl").write_text(lines(records))
    (workdir / "metrics.jsonl").write_text(lines(metrics))
    (workdir / "summary.json").write_text(json.dumps(summary or {}))
    (workdir / "config.json").write_text(json.dumps(config or {}))
    return Page(write_report(workdir).read_text(encoding="utf-8"))


def test_the_page_holds_table_curves_episodes_and_config(tmp_path):
    page = make(
        tmp_path,
        [episode()],
        {"eval/before/accuracy": 0.7, "eval/after/accuracy": 0.9612},
        [{"step": s, "stage": "grpo", "reward/mean": s / 3} for s in (1, 2)],
        {"grpo": {"loss": {"kl_weight": 0.05}}, "stages": ["sft"]},
    )
    for text in ("0.961", "0.70 before", "grpo: 2 steps", "grpo.loss.kl_weight", "question 0"):
        assert text in page.text
    assert len(page.named("svg")) == 1
    assert page.named("img")[0]["src"] == f"data:image/png;base64,{PIXEL}"


def test_what_models_and_pages_write_stays_text(tmp_path):
    item = {"title": EVIL, "text": EVIL, "link": "javascript:alert(1)", "thumbnail": EVIL}
    result = {"tool": EVIL, "items": [item], "error": EVIL}
    turns = [{"author": EVIL, "text": f"<reason>{EVIL}"}, {"author": "tool", "result": result}]
    record = episode(
        example=EVIL, question=EVIL, answers=[EVIL], category=EVIL, image=EVIL, ending=EVIL,
        reward={EVIL: EVIL}, turns=turns,
    )  # fmt: skip
    metrics = [{"step": s, "stage": EVIL, EVIL: 1.0, "x/" + EVIL: 1.0} for s in (1, 2)]
    summary = {f"eval/{EVIL}/accuracy": 0.5, "eval/after/reward": 0.5}
    page = make(tmp_path, [record], summary, metrics, {EVIL: EVIL})
    assert page.named("script") == [] and page.named("img") == [] and page.named("a") == []
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert page.text.count(EVIL) >= 10
    assert "default-src 'none'" in page.named("meta")[2]["content"]


def test_a_page_needs_nothing_from_outside(tmp_path):
    page = make(tmp_path, [episode()], metrics=[{"step": s, "stage": "a", "b": 1} for s in (1, 2)])
    assert page.named("link") == [] and page.named("iframe") == []
    assert all(image["src"].startswith("data:") for image in page.named("img"))


def test_a_dozen_episodes_of_all_kinds(tmp_path):
    same = [episode(0) for _ in range(30)]
    others = [episode(1, "unknown", searched=True), episode(2, "known", searched=True)]
    page = make(tmp_path, same + others)
    assert len(page.named("article")) == 12
    assert "question 1" in page.text and "question 2" in page.text


def test_episodes_of_the_newest_steps(tmp_path):
    make(tmp_path, [episode(20)])
    folder = tmp_path / "trajectories"
    (folder / "9.jsonl").write_text(lines([episode(9)]))
    (folder / "100.jsonl").write_text(lines([episode(100)] * 12))
    page = Page(write_report(tmp_path).read_text())
    assert page.text.count("step 100") == 12
    (folder / "eval.jsonl").write_text(lines([episode(7)]))
    page = Page(write_report(tmp_path).read_text())
    assert page.text.count("step eval") == 1 and page.text.count("step 100") == 11


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "No steps logged yet" in write_report(tmp_path).read_text()


def test_an_episode_with_hardly_anything_is_shown(tmp_path):
    assert len(make(tmp_path, [{}, {"turns": [{}], "reward": None}]).named("article")) == 2


def test_texts_may_hold_any_line_separator(tmp_path):
    assert "a\u2028b\x85c" in make(tmp_path, [episode(question="a\u2028b\x85c")]).text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_summary_is_named(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json"):
        write_report(tmp_path)


def test_a_broken_trajectory_is_named(tmp_path):
    make(tmp_path, [episode()])
    (tmp_path / "trajectories" / "20.jsonl").write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"20\.jsonl, line 2"):
        write_report(tmp_path)


def test_a_step_that_shows_no_trajectory_is_passed_over(tmp_path):
    """What `--grpo.save-trajectories 0` leaves."""
    assert make(tmp_path, []).named("article") == []


@pytest.mark.parametrize(
    "data", [b'{"a": "\xff"}', b'{"turns": [1]}', b'{"answers": null}', b'{"seconds": "long"}']
)
def test_a_file_that_holds_something_else_is_named(tmp_path, data):
    make(tmp_path, [episode()])
    (tmp_path / "trajectories" / "20.jsonl").write_bytes(data + b"\n")
    with pytest.raises(ValueError, match=r"20\.jsonl"):
        write_report(tmp_path)


def test_segments():
    assert segments("a<reason>b</reason><x>") == [
        ("text", "a"), ("tag", "<reason>"), ("text", "b"), ("tag", "</reason>"), ("text", "<x>"),
    ]  # fmt: skip
    assert segments("") == []


@pytest.mark.parametrize("link", ["javascript:alert(1)", "data:x", "//a.b", "", None, 3, "http:x"])
def test_only_web_links_are_links(link):
    assert web_link(link) is None
    assert web_link("HTTPS://a.b/c") == "HTTPS://a.b/c"


@pytest.mark.parametrize("data", ["", None, "not base64!", '"><script>', "aGk=\n<", 7])
def test_only_base64_is_a_picture(data):
    assert picture_source(data) is None

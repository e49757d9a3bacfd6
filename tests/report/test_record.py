import base64
import io
import json

import numpy as np
from PIL import EpsImagePlugin, Image

from mmsr_jax.cli.blocks import lines
from mmsr_jax.report.record import MAX_SIDE, result_record, trajectory_record
from mmsr_jax.types import (
    Author,
    Ending,
    Example,
    ResultItem,
    Tokens,
    ToolCall,
    ToolResult,
    Trajectory,
    Turn,
)


def picture(size, format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format)
    return file.getvalue()


def trajectory(image, turns=()):
    empty = np.zeros(0, np.int32)
    tokens = Tokens(empty, empty, np.zeros((3, 0), np.int32), empty, empty, empty, (), 0)
    example = Example("id-1", "Which?", image, ("A", "B"), "flags", "known", "NP")
    return Trajectory(example, 2, tokens, turns, ("x",), Ending.TOOL_BUDGET, 1.5, 0.25)


def opened(data):
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_trajectory_becomes_plain_json():
    call = ToolCall("image_search", "", b"", "Which?")
    item = ResultItem("Nepal", "flags:NP", "text", picture((8, 4)))
    turns = (
        Turn(Author.MODEL, "<search><img></search>", call=call),
        Turn(Author.TOOL, "1. Nepal", result=ToolResult("image_search", (item,), 0.25)),
        Turn(Author.TOOL, "", result=ToolResult("text_search", (), 30.0, "timeout")),
    )
    score = {"total": 0.9, "correct": True, "format": True, "searches": 1}
    record = json.loads(json.dumps(trajectory_record(trajectory(picture((8, 4)), turns), score)))
    assert record["example"] == "id-1" and record["answers"] == ["A", "B"]
    assert record["ending"] == "tool_budget" and record["reward"] == score
    assert record["turns"][0]["call"] == {"tool": "image_search", "query": ""}
    found = record["turns"][1]["result"]["items"][0]
    assert found["title"] == "Nepal" and opened(found["thumbnail"]).size == (8, 4)
    assert record["turns"][2]["result"]["error"] == "timeout"


def test_pictures_are_small_png_whatever_they_were():
    for image in (picture((2000, 1000)), picture((2000, 1000), "JPEG"), picture((8, 4), "GIF")):
        shown = opened(trajectory_record(trajectory(image), {})["image"])
        assert shown.format == "PNG" and max(shown.size) <= MAX_SIDE


def test_a_small_png_stays_as_it_is():
    image = picture((8, 4))
    assert base64.b64decode(trajectory_record(trajectory(image), {})["image"]) == image


def test_a_broken_picture_costs_only_the_picture():
    broken = picture((600, 600))[:80]
    assert trajectory_record(trajectory(broken), {})["image"] == ""
    assert trajectory_record(trajectory(b"no picture"), {})["image"] == ""


def test_no_picture_starts_a_program(monkeypatch):
    """Pillow hands PostScript to Ghostscript, and an index folder's thumbnails are as they came."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: started.append(1))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    item = ResultItem("Nepal", thumbnail=script)
    shown = result_record(ToolResult("image_search", (item,), 0.1))
    assert shown["items"][0]["thumbnail"] == "" and not lines(script) and not started

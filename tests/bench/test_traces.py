"""Traces: drawn the same for the same seed, written, read, and refused with the line's number."""

import json

import numpy as np
import pytest

from mmsr_jax.bench import traces
from mmsr_jax.inputs import chat
from mmsr_jax.model.config import preset
from mmsr_jax.types import Author

CONFIG = preset("tiny")


def ids(trace):
    return np.concatenate([piece.ids for piece in trace.pieces])


def test_drawn_traces_are_conversations_with_rounds_and_pictures():
    drawn = traces.draw(6, CONFIG)
    assert len(drawn) == 6 * traces.SAMPLES
    groups = traces.by_group(drawn)
    assert [len(group) for group in groups] == [traces.SAMPLES] * 6
    assert all(len({trace.prompt.ids.tobytes() for trace in group}) == 1 for group in groups)
    assert {len(trace.turns) for trace in drawn} == {1, 2, 3}
    for trace in drawn:
        whole = chat.join(*trace.pieces)  # raises when positions or picture rows do not go on
        assert len(whole) == trace.tokens
        assert sum(trace.turns) == int((whole.authors == Author.MODEL).sum())
        assert whole.pictures == trace.pictures(len(trace.pieces))
        assert int((whole.image_index >= 0).sum()) == sum(
            len(p.patches) // 4 for p in whole.pictures
        )
    names = [p.digest for trace in drawn for p in trace.pictures(len(trace.pieces))[1:]]
    assert len(set(names)) < len(names)  # thumbnails come again


def test_the_seed_decides():
    first, again, other = (traces.draw(2, CONFIG, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(ids(a), ids(b)) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(ids(first[0]), ids(other[0]))
    with pytest.raises(ValueError, match="0 groups"):
        traces.draw(0, CONFIG)


def test_distinct_tokens_count_a_prompt_once():
    drawn = traces.draw(2, CONFIG)
    prompts = len(drawn[0].prompt) + len(drawn[-1].prompt)
    tools = sum(len(piece) for trace in drawn for piece in trace.tools)
    assert tools > 0 and traces.distinct_tokens(drawn) == prompts + tools


def test_a_file_holds_what_was_drawn(tmp_path):
    drawn, file = traces.draw(3, CONFIG), tmp_path / "traces.jsonl"
    traces.save(drawn, file)
    read = traces.load(file, CONFIG)
    for left, right in zip(drawn, read, strict=True):
        assert (left.group, left.sample, left.turns) == (right.group, right.sample, right.turns)
        for a, b in zip(left.pieces, right.pieces, strict=True):
            for field in ("ids", "authors", "positions", "image_index"):
                np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
            assert [p.grid for p in a.pictures] == [p.grid for p in b.pictures]
    # Equal pictures are equal again, and only those.
    shown = [[p.digest for t in side for p in t.pictures(len(t.pieces))] for side in (drawn, read)]
    assert [shown[0].index(name) for name in shown[0]] == [shown[1].index(n) for n in shown[1]]


def said(*pieces, group="a"):
    return json.dumps({"group": group, "sample": 0, "pieces": pieces})


PROMPT = {"author": "prompt", "ids": [50, 51]}
WORDS = {"author": "model", "ids": [60]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is no trace"),
        ([said(PROMPT, WORDS), '{"group": "a", "sample": 0}'], "line 2 is no trace: no 'pieces'"),
        ([said(PROMPT)], "pieces by prompt, not by prompt, model"),
        ([said(PROMPT, WORDS, WORDS, WORDS)], "pieces by prompt, model, model, model"),
        ([said(PROMPT, {"author": "model", "ids": [512]})], "outside of 0 .. 511"),
        ([said(PROMPT, {"author": "model", "ids": []})], "no ids"),
        ([said({"author": "prompt", "ids": [9, 12, 10]}, WORDS)], "1 image tokens, but 0 pictures"),
        ([said(PROMPT, WORDS), said(WORDS | {"author": "prompt"}, WORDS)], "has two prompts"),
        ([""], "has no traces"),
    ],
)
def test_broken_files(tmp_path, lines, message):
    file = tmp_path / "traces.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        traces.load(file, CONFIG)


def test_a_picture_token_that_the_model_says_is_text(tmp_path):
    file = tmp_path / "traces.jsonl"
    file.write_text(said(PROMPT, {"author": "model", "ids": [12, 12]}))
    (trace,) = traces.load(file, CONFIG)
    assert trace.pieces[1].image_index.tolist() == [-1, -1] and not trace.pieces[1].pictures
    assert trace.pieces[1].positions.tolist() == [[2, 3]] * 3

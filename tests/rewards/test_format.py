import pytest

from mmsr_jax.rewards.format import well_formed

I = "<reason>r</reason><search><img></search>"  # noqa: E741
T = "<reason>r</reason><text_search>q</text_search>"
A = "<reason>r</reason><answer>x</answer>"


@pytest.mark.parametrize(
    ("responses", "good"),
    [
        ([A], True),
        ([I, A], True),
        ([T, A], True),
        ([I, T, A], True),
        ([T, T, A], False),
        ([T, I, A], False),
        ([I, I, A], False),
        ([A, A], False),
        ([I, A, A], False),
        ([I], False),
        ([I, T], False),
        ([], False),
        # Any number of rounds is judged, none raises.
        ([I, T, T, A], False),
        ([I] * 29 + [A], False),
    ],
)
def test_sequences(responses, good):
    assert well_formed(responses) is good


def test_a_longer_protocol_may_allow_more_searches():
    assert well_formed([I, T, T, A], text_searches=2)
    assert well_formed([T] * 8 + [A], image_searches=0, text_searches=8)
    assert not well_formed([T, I, A], text_searches=2)
    assert not well_formed([I, A], image_searches=0)


@pytest.mark.parametrize(
    "response",
    [
        f"  {A}\n",
        "<reason>r\ns</reason>\n\nSo then:\n<answer>x\ny</answer>",
        "<reason></reason><answer></answer>",
        "<reason>2 < 3 <b>bold</b></reason><answer>x</answer>",
    ],
)
def test_good_answers(response):
    assert well_formed([response])


@pytest.mark.parametrize(
    "response",
    [
        "",
        "x",
        "<answer>x</answer>",
        "well, <reason>r</reason><answer>x</answer>",
        "<reason>r<answer>x</answer>",
        "<reason>r</reason><answer>x</answer>.",
        "<reason>r</reason><reason>s</reason><answer>x</answer>",
        "<reason>r</reason></reason><answer>x</answer>",
        "<reason>r</reason><answer>x</answer><answer>y</answer>",
        "<reason>r<answer>x</answer></reason><answer>y</answer>",
        "<reason>r<answer>x</reason></answer>",
        "<reason>r <search><img></search></reason><answer>x</answer>",
        "<reason>r <text_search></reason><answer>x</answer>",
        "<reason>r </text_search></reason><answer>x</answer>",
        "<answer>x</answer><reason>r</reason>",
    ],
)
def test_bad_answers(response):
    assert not well_formed([response])


@pytest.mark.parametrize(
    ("response", "good"),
    [
        # What is well formed is also run: same white space, same line breaks.
        (I + " ", True),
        (I + "\n\n", True),
        ("<reason>r</reason> look: <search><img></search>", True),
        ("<reason>r</reason><text_search>a\nb</text_search>\n", True),
        ("<search><img></search>", False),
        ("<reason>r</reason><search><img></search><search><img></search>", False),
        ("<reason>r <answer></reason><search><img></search>", False),
        ("<reason>r <text_search></reason><search><img></search>", False),
        ("<reason>r <search><img></search></reason><text_search>q</text_search>", False),
        ("<reason>r <text_search> </reason><text_search>q</text_search>", False),
        ("<reason>r</reason><text_search></text_search>", False),
        ("<reason>r</reason><text_search>" + "x" * 600 + "</text_search>", False),
    ],
)
def test_searches(response, good):
    assert well_formed([response, A]) is good

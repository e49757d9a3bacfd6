import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsr_jax.rewards import answer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Crème-brûlée, U.S. 1,000", "crèmebrûlée us 1000"),
        ("The  Eiffel\tTower.", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("theatre another", "theatre another"),
        ("A.", ""),
        ("the", ""),
        ("!!", ""),
        ("“quoted” – dash", "“quoted” – dash"),
        ("🇵🇹 flag", "🇵🇹 flag"),
        ("a-the b", "athe b"),
    ],
)
def test_normalise(text, normal):
    assert answer.normalise(text) == normal


@given(st.text(max_size=40))
def test_normalised_text_holds_no_marks_and_single_spaces(text):
    once = answer.normalise(text)
    assert once == " ".join(once.split())
    assert not set(once) & set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "subem"),
    [
        ("Lisbon", ["Lisbon"], True, True),
        (" the LISBON!", ["Porto", "lisbon"], True, True),
        ("the city of Lisbon", ["Lisbon"], False, True),
        ("Lis", ["Lisbon"], False, False),
        ("Lisbon", [], False, False),
        # Accepted answers that normalise to nothing match nothing.
        ("", ["the", "!!"], False, False),
        ("anything", ["the"], False, False),
        ("", ["Lisbon"], False, False),
        ("a", ["", "a"], False, False),
    ],
)
def test_exact_match(prediction, golds, em, subem):
    before = list(golds)
    assert answer.exact_match(prediction, golds) is em
    assert answer.exact_match(prediction, golds, "subem") is subem
    assert golds == before


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'f1'"):
        answer.exact_match("a", ["a"], "f1")
    with pytest.raises(ValueError, match="list"):
        answer.exact_match("a", "a")


@pytest.mark.parametrize(
    ("response", "content"),
    [
        ("<answer> a\nb </answer>", "a\nb"),
        ("<answer>a</answer> no, <answer>b</answer>", "b"),
        ("<answer>a</answer> trailing", "a"),
        ("<answer>a <answer>b</answer>", "b"),
        ("<answer>a</answer> x </answer>", "a"),
        ("<answer>a", None),
        ("a</answer>", None),
        ("", None),
    ],
)
def test_extract(response, content):
    assert answer.extract(response) == content

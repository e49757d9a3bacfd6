"""Means by entity, errors that count entities, pairs, and the constant policies."""

import numpy as np
import pytest

from mmsr_jax.evaluation import metrics, policies
from mmsr_jax.evaluation.metrics import Scored
from mmsr_jax.rewards.score import Score, score
from mmsr_jax.types import Author, Ending, ToolCall, ToolResult, Trajectory, Turn


def scored(tiny, entity, category, total, *, correct=True, form=True, searches=0, turns=()):
    example = tiny.example(f"{category}/{entity}", category=category, entity=entity)
    tokens = tiny.prompt("What?")
    played = Trajectory(example, 0, tokens, turns, ("",), Ending.ANSWERED)
    return Scored(played, Score(total, correct, form, searches))


@pytest.fixture(scope="module")
def evaluation(tiny):
    """Entity "a" is asked three times, the others once: it counts no more than they do."""
    return [
        *(scored(tiny, "a", "known", 1.0) for _ in range(3)),
        scored(tiny, "b", "known", 0.0, correct=False, form=False),
        scored(tiny, "c", "known", 0.91, searches=2),
        scored(tiny, "d", "unknown", 0.91, searches=1),
        scored(tiny, "e", "unknown", 0.1, correct=False),
        scored(tiny, "f", "never_shown", 0.5, correct=False),
    ]


def test_means_are_over_entities(evaluation):
    found = metrics.summarise(evaluation, ("known", "unknown"))
    assert found["known/accuracy"] == pytest.approx(2 / 3)  # by question it would be 4 / 5
    assert found["known/reward"] == pytest.approx((1.0 + 0.0 + 0.91) / 3)
    assert found["known/search_ratio"] == pytest.approx(1 / 3)
    assert found["known/format"] == pytest.approx(2 / 3)
    assert found["unknown/search_ratio"] == pytest.approx(1 / 2)
    assert found["search_ratio"] == pytest.approx(2 / 5)
    assert found["reward"] == pytest.approx((1.0 + 0.0 + 0.91 + 0.91 + 0.1) / 5)
    assert (found["count"], found["known/count"], found["unknown/count"]) == (7, 5, 2)
    assert not any("never_shown" in name for name in found)


def test_errors_are_those_of_the_mean_over_entities(evaluation):
    found = metrics.summarise(evaluation, ("known", "unknown"))
    rewards = np.asarray([1.0, 0.0, 0.91])
    assert found["known/reward_se"] == pytest.approx(rewards.std(ddof=1) / np.sqrt(3))
    one = metrics.summarise(evaluation, ("never_shown",))
    assert one["never_shown/reward"] == 0.5 and one["never_shown/reward_se"] == 0


def test_accuracy_given_a_search_and_given_none(evaluation):
    found = metrics.summarise(evaluation, ("known", "unknown"))
    assert found["known/accuracy_direct"] == pytest.approx(3 / 4)
    assert found["known/accuracy_searched"] == 1.0
    assert found["unknown/accuracy_direct"] == 0.0
    only = metrics.summarise(evaluation[:3], ("known",))
    assert "known/accuracy_searched" not in only


def test_a_category_without_questions_has_a_count_of_zero(evaluation):
    assert metrics.summarise(evaluation, ("nowhere",)) == {"count": 0.0, "nowhere/count": 0.0}


def test_pairs_are_made_by_entity(tiny):
    left = [scored(tiny, e, "known", r) for e, r in zip("abbc", (1.0, 0.8, 0.6, 0.0), strict=True)]
    right = [scored(tiny, e, "known", r) for e, r in zip("abd", (0.5, 0.1, 9.0), strict=True)]
    gap, error = metrics.paired(left, right, "reward")
    gaps = np.asarray([0.5, 0.6])
    assert gap == pytest.approx(gaps.mean())
    assert error == pytest.approx(gaps.std(ddof=1) / np.sqrt(2))
    with pytest.raises(ValueError, match="share no entity"):
        metrics.paired(left, [scored(tiny, "z", "known", 1.0)], "reward")


def test_what_a_step_of_training_logs(tiny):
    def call(tool):
        return Turn(Author.MODEL, "", call=ToolCall(tool, "", b"", ""))

    def answer(error=None):
        return Turn(Author.TOOL, "", result=ToolResult("text_search", (), 0.1, error))

    both = (call("image_search"), answer(), call("text_search"), answer("timeout"))
    found = metrics.training(
        [
            scored(tiny, "a", "known", 1.0),
            scored(tiny, "a", "known", 0.1, correct=False),
            scored(tiny, "b", "unknown", 0.91, searches=2, turns=both),
            scored(tiny, "b", "unknown", 0.91, searches=1, turns=(call("text_search"), answer())),
        ]
    )
    expected = {
        "reward/mean": 0.73, "reward/accuracy": 0.75, "reward/format": 1.0, "search/ratio": 0.5,
        "search/image_ratio": 0.25, "search/text_ratio": 0.5, "tools/errors": 1.0,
        "search/ratio/known": 0.0, "search/ratio/unknown": 1.0, "reward/mean/known": 0.55,
        "reward/mean/unknown": 0.91, "ending/answered": 1.0,
        "length/tokens": len(tiny.prompt("What?")),
    }  # fmt: skip
    assert found == pytest.approx(expected)


def test_constant_policies_begin_as_the_policy_itself_would(tiny):
    """Forced text must be the tokens that stand at the start of a whole response."""
    config = policies.EvaluationConfig(search_reason="Look.", direct_reason="Known.")
    search, direct = policies.always_search(config), policies.never_search(config)
    whole = "<reason>Look.</reason><search><img></search>"
    assert search == whole and tiny.tokenizer.encode(search) == tiny.tokenizer.encode(whole)
    whole = "<reason>Known.</reason><answer> Lisbon</answer>"
    ids = tiny.tokenizer.encode(direct)
    assert whole.startswith(direct) and tiny.tokenizer.encode(whole)[: len(ids)] == ids
    assert score([search, whole], ["Lisbon"]).searches == 1
    assert score([whole], ["Lisbon"]).searches == 0

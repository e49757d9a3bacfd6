import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsr_jax.rewards.score import RewardConfig, Score, count_searches, score

I = "<reason>r</reason><search><img></search>"  # noqa: E741
T = "<reason>r</reason><text_search>q</text_search>"
A = "<reason>r</reason><answer>Lisbon</answer>"
BARE = "<answer>Lisbon</answer>"
WRONG = "<reason>r</reason><answer>Porto</answer>"
LONGER = "<reason>r</reason><answer>old Lisbon town</answer>"
COUNT = RewardConfig(count_searches=True)


@pytest.mark.parametrize(
    ("responses", "config", "expected"),
    [
        ([A], RewardConfig(), Score(1.0, True, True, 0)),
        ([I, A], RewardConfig(), Score(0.91, True, True, 1)),
        ([T, A], RewardConfig(), Score(0.91, True, True, 1)),
        ([I, T, A], RewardConfig(), Score(0.91, True, True, 2)),
        ([I, T, A], COUNT, Score(0.829, True, True, 2)),
        ([T, T, A], RewardConfig(), Score(0.81, True, False, 2)),
        ([T, I, A], RewardConfig(), Score(0.81, True, False, 2)),
        ([T, T, A], COUNT, Score(0.729, True, False, 2)),
        ([BARE], RewardConfig(), Score(0.9, True, False, 0)),
        ([WRONG], RewardConfig(), Score(0.1, False, True, 0)),
        ([I, WRONG], RewardConfig(), Score(0.1, False, True, 1)),
        ([I, T, WRONG], COUNT, Score(0.1, False, True, 2)),
        ([I], RewardConfig(), Score(0.0, False, False, 1)),
        ([I, T, I], RewardConfig(), Score(0.0, False, False, 2)),
        ([I, "I cannot tell."], RewardConfig(), Score(0.0, False, False, 1)),
        # An answer before the last response does not count.
        ([A, I], RewardConfig(), Score(0.0, False, False, 0)),
        # An answer is read wherever it stands in the last response, form is another matter.
        ([A + " I am sure."], RewardConfig(), Score(0.9, True, False, 0)),
        # A single response that also shows a search tag pays for it.
        (
            ["<reason>no <search><img></search></reason>" + BARE],
            RewardConfig(),
            Score(0.81, True, False, 1),
        ),
        # More rounds than the paper's three.
        ([I, T, T, T, A], RewardConfig(), Score(0.81, True, False, 4)),
        ([I, T, T, T, A], RewardConfig(text_searches=3), Score(0.91, True, True, 4)),
        ([A], RewardConfig(format_weight=0.0), Score(1.0, True, True, 0)),
        ([I, A], RewardConfig(search_penalty=0.5, format_weight=0.2), Score(0.6, True, True, 1)),
        ([LONGER], RewardConfig(), Score(0.1, False, True, 0)),
        ([LONGER], RewardConfig(accuracy_mode="subem"), Score(1.0, True, True, 0)),
    ],
)
def test_table(responses, config, expected):
    answers = ["lisbon", "Lisboa"]
    found = score(responses, answers, config)
    assert found.total == pytest.approx(expected.total, abs=1e-12)
    assert (found.correct, found.format, found.searches) == (
        expected.correct,
        expected.format,
        expected.searches,
    )
    assert answers == ["lisbon", "Lisboa"]
    assert score(tuple(responses), tuple(answers), config) == found


def test_empty_answers_and_empty_golds_are_wrong():
    silent = "<reason>r</reason><answer></answer>"
    assert score([silent], ["the", "!!", ""]).total == pytest.approx(0.1)
    assert score([silent], [], RewardConfig(accuracy_mode="subem")).total == pytest.approx(0.1)
    assert not score([A], []).correct


def test_text_search_is_counted_by_both_its_tags():
    assert count_searches(["<text_search>q", A]) == 0
    assert count_searches(["q</text_search> <text_search>", A]) == 1
    assert count_searches([I + T, A]) == 1
    assert count_searches([A, I]) == 0


texts = st.lists(st.sampled_from([I, T, A, WRONG, BARE, "", "x"]), min_size=1, max_size=6)


@given(texts, st.booleans(), st.sampled_from(["em", "subem"]))
def test_any_episode_scores_between_nothing_and_one(responses, count, mode):
    config = RewardConfig(accuracy_mode=mode, count_searches=count)
    found = score(responses, ["Lisbon"], config)
    assert 0.0 <= found.total <= 1.0
    assert (found.total > 0.5) == found.correct or count
    if len(responses) <= 3 and not count:
        levels = [0, 0.1, 0.81, 0.9, 0.91, 1.0]
        assert min(abs(found.total - level) for level in levels) < 1e-12


def test_warm_up_of_the_penalty():
    config = RewardConfig(search_penalty=0.1, warmup_steps=10)
    penalties = [config.at_step(step).search_penalty for step in (1, 6, 11, 99)]
    assert penalties == pytest.approx([-0.1, 0.0, 0.1, 0.1])
    early = score([I, A], ["Lisbon"], config.at_step(1))
    assert early.total == pytest.approx(0.9 * 1.1 + 0.1)
    assert score([I, A], ["Lisbon"], config).total == pytest.approx(0.91)
    assert RewardConfig().at_step(1) == RewardConfig()


@pytest.mark.parametrize(
    "values", [{"accuracy_mode": "f1"}, {"format_weight": 1.5}, {"search_penalty": -2.0}]
)
def test_bad_configs_are_refused(values):
    with pytest.raises(ValueError, match=str(next(iter(values.values())))):
        RewardConfig(**values)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="list"):
        score([], ["Lisbon"])
    with pytest.raises(ValueError, match="list"):
        score(A, ["Lisbon"])
    with pytest.raises(ValueError, match="list"):
        score(["no answer at all"], "Lisbon")


def test_rewards_never_import_jax():
    code = "import sys, mmsr_jax.rewards.score; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

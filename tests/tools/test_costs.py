"""What a training run costs, from what was counted."""

import pytest

from mmsr_jax.tools.costs import Calls, estimate, measure, table


def test_fvqa_with_every_sample_searching():
    """The worst case: each of 4,856 x 8 x 5 samples searches its picture, and asks one text."""
    image = Calls("lens", 0.003, calls=16, distinct=2, again=0, questions=2, samples=8)
    text = Calls("search", 0.001, calls=16, distinct=10, again=4, questions=2, samples=8)
    lens, search, all_ = estimate([image, text])
    assert (lens.calls, lens.live) == (194_240, 4_856)
    assert lens.money == pytest.approx(582.72) and lens.money_stored == pytest.approx(14.568)
    assert search.calls == 194_240 and search.live == 4_856 * (5 + 2 * 4)
    assert all_.money == pytest.approx(582.72 + 194.24)
    assert all_.money_stored == pytest.approx(14.568 + 63.128)


def test_counts_of_a_run_are_scaled_to_questions_samples_and_epochs():
    epochs = [["a", "a", "b", "b"], ["a", "b", "c", "c"], ["c", "d", "e", "f"]]
    kind = measure("search", 0.01, epochs, questions=2, samples=2)
    assert (kind.calls, kind.distinct, kind.again) == (4, 2, 2)  # 1 new one, then 3
    row, all_ = estimate([kind], questions=20, samples=4, epochs=3)
    assert row.calls == 4 * 10 * 2 * 3 and row.live == (2 + 2 * 2) * 10
    assert all_.money == row.money == pytest.approx(2.4)
    lines = table([row, all_]).splitlines()
    assert lines[2] == "| search | 0.01 | 240 | 2.40 | 60 | 0.60 |"


@pytest.mark.parametrize("wrong", [{"distinct": 5}, {"again": -1}, {"questions": 0}])
def test_counts_that_cannot_be_are_refused(wrong):
    good = {"calls": 4, "distinct": 2, "again": 1, "questions": 2, "samples": 2}
    with pytest.raises(ValueError, match="search:"):
        Calls("search", 0.01, **good | wrong)
    with pytest.raises(ValueError, match="0 samples"):
        estimate([Calls("search", 0.01, **good)], samples=0)
    with pytest.raises(ValueError, match="no kind of call"):
        estimate([])

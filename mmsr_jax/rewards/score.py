"""The reward of MMSearch-R1: accuracy, cheaper answers first, and a little for form.

    total = (1 - format_weight) * correct * (1 - search_penalty)^k + format_weight * format

with k = 1 if there was any search (or the number of searches, `count_searches`). A wrong answer
is never punished for searching.
"""

import dataclasses
from collections.abc import Sequence

from mmsr_jax.protocol import IMAGE_SEARCH, TEXT_SEARCH, TEXT_SEARCH_END
from mmsr_jax.rewards import answer, format


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The defaults are those of the paper and its script."""

    accuracy_mode: str = "em"  # or "subem"
    format_weight: float = 0.1
    search_penalty: float = 0.1
    count_searches: bool = False  # pay for every search instead of once
    image_searches: int = 1  # well-formed episodes have at most so many picture searches ...
    text_searches: int = 1  # ... and then so many text searches
    warmup_steps: int = 0  # steps over which the penalty rises from its negative; see `at_step`

    def __post_init__(self):
        if self.accuracy_mode not in answer.MODES:
            raise ValueError(
                f"reward.accuracy_mode is {self.accuracy_mode!r}: {' or '.join(answer.MODES)}"
            )
        if not 0 <= self.format_weight <= 1:
            raise ValueError(f"reward.format_weight is {self.format_weight}, not within 0 and 1")
        if not -1 <= self.search_penalty <= 1:
            raise ValueError(f"reward.search_penalty is {self.search_penalty}, not within -1 and 1")

    def at_step(self, step: int) -> "RewardConfig":
        """The config of training step 1, 2, ...: at first searching is rewarded, not punished.

        The penalty rises in a straight line from -search_penalty at step 1 to +search_penalty
        at step 1 + warmup_steps. Evaluation uses the config itself: always the full penalty.
        """
        if self.warmup_steps < 1:
            return self
        done = min(max(step - 1, 0) / self.warmup_steps, 1.0)
        penalty = self.search_penalty * (2 * done - 1)
        return dataclasses.replace(self, search_penalty=penalty, warmup_steps=0)


@dataclasses.dataclass(frozen=True)
class Score:
    """A reward with its parts."""

    total: float
    correct: bool
    format: bool
    searches: int  # responses that showed a search tag where a search could be run


def score(
    responses: Sequence[str], answers: Sequence[str], config: RewardConfig = RewardConfig()
) -> Score:
    """Scores the responses of one trajectory.

    Args:
        responses: text of each model turn, in order, special tokens stripped.
        answers: accepted answers.

    Raises:
        ValueError: no response, or one string in place of a list.
    """
    if isinstance(responses, str) or not responses:
        raise ValueError(f"responses must be a list of at least one text, got {responses!r}")
    if isinstance(answers, str):
        raise ValueError(f"accepted answers must be a list, got the string {answers!r}")
    said = answer.extract(responses[-1])
    correct = said is not None and answer.exact_match(said, answers, config.accuracy_mode)
    good_form = format.well_formed(responses, config.image_searches, config.text_searches)
    searches = count_searches(responses)
    paid = searches if config.count_searches else min(searches, 1)
    value = correct * (1 - config.search_penalty) ** paid
    total = (1 - config.format_weight) * value + config.format_weight * good_form
    return Score(float(total), correct, good_form, searches)


def count_searches(responses: Sequence[str]) -> int:
    """Responses with a search tag, the last one left out unless it is the only one.

    Counted by the tags in the text, whether the search was run, failed, or was only quoted: a
    single response that answers and also shows a search tag pays for it, as in MMSearch-R1.
    """
    considered = responses[:-1] if len(responses) > 1 else responses
    return sum(
        IMAGE_SEARCH in text or (TEXT_SEARCH in text and TEXT_SEARCH_END in text)
        for text in considered
    )

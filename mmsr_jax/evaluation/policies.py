"""The policies that an evaluation compares: the learned one, and the two that never choose."""

import dataclasses

from mmsr_jax import protocol


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How the table is made."""

    categories: tuple[str, ...] = ("known", "unknown")  # what the overall numbers are over
    unseen: tuple[str, ...] = ("never_shown",)  # reported apart
    samples: int = 2  # a picture, at the training temperature
    search_reason: str = " Look."  # words put into the mouth of the constant policies
    direct_reason: str = " Known."

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"evaluation.samples must be at least 1, not {self.samples}")


def always_search(config: EvaluationConfig) -> str:
    """A first response that searches, whatever the question; the model has only to end it.

    It is whole because a tokenizer cuts the middle of a tag elsewhere: after `<search><img>` alone
    stand other tokens than the model has ever seen there.
    """
    return protocol.render(config.search_reason, protocol.ImageSearch())


def never_search(config: EvaluationConfig) -> str:
    """Beginning of a first response that answers."""
    return f"{protocol.REASON}{config.direct_reason}{protocol.REASON_END}{protocol.ANSWER}"

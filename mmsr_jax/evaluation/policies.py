"""The policies that an evaluation compares: the learned one, and the two that never choose."""

import dataclasses

from mmsr_jax import protocol


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How the table is made."""

    categories: tuple[str, ...] = ("known", "unknown")  # what the overall numbers are over
    unseen: tuple[str, ...] = ("never_shown",)  # reported apart
    samples: int = 2  # a picture, at the training temperature
    search_reason: str = "Look."  # words put into the mouth of the constant policies
    direct_reason: str = "Known."


def always_search(config: EvaluationConfig) -> str:
    """Beginning of a first response that searches, whatever the question."""
    action = protocol.IMAGE_SEARCH.removesuffix("</search>")
    return f"{protocol.REASON}{config.search_reason}{protocol.REASON_END}{action}"


def never_search(config: EvaluationConfig) -> str:
    """Beginning of a first response that answers."""
    return f"{protocol.REASON}{config.direct_reason}{protocol.REASON_END}{protocol.ANSWER}"

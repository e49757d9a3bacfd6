"""Is the answer right? Normalisation and comparison of short answers."""

import re
import string
from collections.abc import Iterable

MODES = ("em", "subem")

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def extract(response: str) -> str | None:
    """Content of the last <answer>...</answer> of a response, stripped; None without one."""
    found = _ANSWER.findall(response)
    return found[-1].strip() if found else None


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces; in this order.

    Other alphabets' marks and accents stay ("Crème-brûlée" -> "crèmebrûlée"). The rule is that
    of MMSearch-R1 (and of SQuAD's evaluation before it).
    """
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, golds: Iterable[str], mode: str = "em") -> bool:
    """Whether a prediction equals ("em") or contains ("subem") one of the accepted answers.

    Accepted answers that normalise to nothing ("the", "!!") are dropped: they would match
    anything. "subem" is generous with short aliases (a country code is in many words).

    Raises:
        ValueError: an unknown mode, or one string in place of a list.
    """
    if mode not in MODES:
        raise ValueError(f"unknown accuracy mode {mode!r}: {' or '.join(MODES)}")
    if isinstance(golds, str):
        raise ValueError(f"accepted answers must be a list, got the string {golds!r}")
    said = normalise(prediction)
    wanted = [gold for gold in (normalise(gold) for gold in golds) if gold]
    if mode == "em":
        return said in wanted
    return any(gold in said for gold in wanted)

"""What can be asked about a country: question, sentence of its article, accepted answers."""

import dataclasses
from collections.abc import Callable

from mmsr_jax.data.flags.facts import OTHER_CAPITALS, Country, plain


@dataclasses.dataclass(frozen=True)
class Attribute:
    """One kind of fact. `answers` gives all accepted spellings, the canonical one first."""

    question: str
    phrase: str  # "capital", as in the query "capital of Nepal"
    sentence: str  # with {name} and {answer}
    answers: Callable[[Country], tuple[str, ...]]


def spellings(*texts: str) -> tuple[str, ...]:
    """Each text in plain ASCII, then as it is; without empty ones and repetitions."""
    return tuple(dict.fromkeys(s for text in texts for s in (plain(text), text) if s))


ATTRIBUTES: dict[str, Attribute] = {
    "capital": Attribute(
        "What is the capital of this country?",
        "capital",
        "The capital of {name} is {answer}.",
        lambda c: spellings(*c.capitals, *OTHER_CAPITALS.get(c.code, ())),
    ),
    "currency": Attribute(
        "What is the currency of this country?",
        "currency",
        "The currency of {name} is the {answer}.",
        lambda c: spellings(*c.currencies),
    ),
    "language": Attribute(
        "Which language is spoken in this country?",
        "language",
        "The language of {name} is {answer}.",
        lambda c: spellings(*c.languages),
    ),
    "subregion": Attribute(
        "In which part of the world is this country?",
        "region",
        "The region of {name} is {answer}.",
        lambda c: spellings(c.subregion, c.region),
    ),
    "demonym": Attribute(
        "What are the people of this country called?",
        "demonym",
        "The demonym of {name} is {answer}.",
        lambda c: spellings(c.demonym),
    ),
    "tld": Attribute(
        "What is the internet domain of this country?",
        "domain",
        "The domain of {name} is {answer}.",
        lambda c: spellings(c.tld),
    ),
    "calling_code": Attribute(
        "What is the calling code of this country?",
        "calling code",
        "The calling code of {name} is {answer}.",
        lambda c: spellings(c.calling_code),
    ),
    "coast": Attribute(
        "Does this country have a coast?",
        "coast",
        "Whether {name} has a coast: {answer}.",
        lambda c: ("no", "landlocked") if c.landlocked else ("yes",),
    ),
}

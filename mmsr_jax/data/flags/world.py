"""The world: which facts are known, unknown or never shown, its articles and its pictures."""

import dataclasses
import hashlib
import json
import math

import numpy as np
from PIL import Image

from mmsr_jax.data.flags import facts
from mmsr_jax.data.flags.attributes import ATTRIBUTES
from mmsr_jax.data.flags.augment import Augmentation, augment, on_white, png
from mmsr_jax.data.flags.facts import Country

CATEGORIES = ("known", "unknown", "unfamiliar", "never_shown")

# A question needs a flag that a small model can tell from all others: measured distance to the
# nearest one (derive.distance) at least this. Nearly equal flags are not in the set at all.
FLAG_MARGIN = 0.08


@dataclasses.dataclass(frozen=True)
class FlagsConfig:
    """Everything that decides what the world holds.

    Questions are (entity, attribute) pairs. `never_shown` and `unfamiliar` count entities, all
    of whose questions get that category; `known` and `unknown` count questions of the other
    entities. With one attribute both are the same.
    """

    known: int = 36  # answer is shown in the warm-up
    unknown: int = 30  # answer stands in no training text, only in the corpus
    unfamiliar: int = 24  # other entities, for warm-up rows that are not about known facts
    never_shown: int = 24  # in no training row of any kind; test split only
    split_seed: int = 0
    attributes: tuple[str, ...] = ("capital",)
    train_pictures: int = 24  # augmented pictures per question
    test_pictures: int = 4
    picture_seed: int = 0
    width: int = 84  # pixels of a question's picture; multiples of 28 need no second resize
    height: int = 56
    thumbnail_width: int = 56  # pixels of the thumbnails in results
    thumbnail_height: int = 28
    augmentation: Augmentation = Augmentation()
    max_name: int = 11  # longest name and answer of an entity with questions, characters

    @property
    def digest(self) -> str:
        """Short hash over all fields; names the built dataset."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Article:
    """A text of the corpus. Its sentences are the passages that search returns."""

    entity: str  # country code
    title: str
    link: str
    sentences: tuple[str, ...]


class World:
    """The flags world of one config. Cheap to make; everything follows from the config.

    `entities` maps the code of each country that has questions to its facts. Countries without
    questions still stand in the corpus and, if their flag is unmistakable, in the image index.
    """

    def __init__(self, config: FlagsConfig = FlagsConfig()):
        wrong = [name for name in config.attributes if name not in ATTRIBUTES]
        if wrong or not config.attributes:
            raise ValueError(f"attributes {wrong or 'missing'}; there are {sorted(ATTRIBUTES)}")
        if len(set(config.attributes)) != len(config.attributes):
            raise ValueError(f"attributes {config.attributes} repeat one another")
        for field in ("width", "height", "thumbnail_width", "thumbnail_height"):
            if getattr(config, field) < 1:
                raise ValueError(f"{field} must be at least 1 pixel, not {getattr(config, field)}")
        self.config = config
        self.countries: dict[str, Country] = dict(facts.countries())
        self.categories: dict[tuple[str, str], str] = self._split()
        codes = sorted({code for code, _ in self.categories})
        self.entities: dict[str, Country] = {code: self.countries[code] for code in codes}

    def qualifying(self) -> list[str]:
        """Codes of the countries fit for questions, shortest texts first.

        Flag margin at least `FLAG_MARGIN`; name and every asked answer at most `max_name`
        characters after transliteration; no answer contains the name (Panama, Panama City).
        """
        lengths = {}
        for code, country in self.countries.items():
            answers = [self.answers(code, attribute)[:1] for attribute in self.config.attributes]
            texts = [country.name, *(answer[0] for answer in answers if answer)]
            if (
                country.flag_margin >= FLAG_MARGIN
                and all(answers)
                and max(map(len, texts)) <= self.config.max_name
                and not any(country.name.casefold() in text.casefold() for text in texts[1:])
            ):
                lengths[code] = sum(map(len, texts))
        return sorted(lengths, key=lambda code: (lengths[code], code))

    def _split(self) -> dict[tuple[str, str], str]:
        config = self.config
        for name in CATEGORIES:
            if getattr(config, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(config, name)}")
        asked = math.ceil((config.known + config.unknown) / len(config.attributes))
        needed = asked + config.unfamiliar + config.never_shown
        fit = self.qualifying()
        if needed > len(fit):
            raise ValueError(
                f"the split needs {needed} countries, only {len(fit)} have names and answers of "
                f"at most {config.max_name} characters and an unmistakable flag"
            )
        rng = np.random.default_rng([config.split_seed, 0])
        codes = [str(code) for code in rng.permutation(fit[:needed])]
        cut = config.never_shown + config.unfamiliar
        categories = {}
        for position, code in enumerate(codes[:cut]):
            category = "never_shown" if position < config.never_shown else "unfamiliar"
            categories |= {(code, attribute): category for attribute in config.attributes}
        pairs = [(code, attribute) for code in codes[cut:] for attribute in config.attributes]
        order = rng.permutation(len(pairs))[: config.known + config.unknown]
        for position, index in enumerate(order):
            categories[pairs[index]] = "known" if position < config.known else "unknown"
        return categories

    def category(self, entity: str, attribute: str) -> str:
        """One of CATEGORIES; KeyError for a pair without questions."""
        return self.categories[entity, attribute]

    def pairs(self, *categories: str) -> list[tuple[str, str]]:
        """All (entity, attribute) with questions, or those of the given categories, sorted."""
        wrong = set(categories) - set(CATEGORIES)
        if wrong:
            raise ValueError(f"categories {sorted(wrong)}; there are {CATEGORIES}")
        return sorted(p for p, c in self.categories.items() if not categories or c in categories)

    def question(self, attribute: str) -> str:
        """The question as a person would put it; it never names the country."""
        return ATTRIBUTES[attribute].question

    def query(self, entity: str, attribute: str) -> str:
        """The text query that finds the fact: "capital of Nepal"."""
        return f"{ATTRIBUTES[attribute].phrase} of {self.countries[entity].name}"

    def answers(self, entity: str, attribute: str) -> tuple[str, ...]:
        """Accepted answers, the canonical one (plain ASCII) first; empty when there is none."""
        return ATTRIBUTES[attribute].answers(self.countries[entity])

    def sentence(self, entity: str, attribute: str) -> str:
        """The passage that states the fact: "The capital of Nepal is Kathmandu."; or ""."""
        answers = self.answers(entity, attribute)
        name = self.countries[entity].name
        return (
            ATTRIBUTES[attribute].sentence.format(name=name, answer=answers[0]) if answers else ""
        )

    def articles(self) -> list[Article]:
        """One short article per country, also for those without questions or flag."""
        result = []
        for code, country in self.countries.items():
            told = [self.sentence(code, attribute) for attribute in ATTRIBUTES]
            area = f"The area of {country.name} is {country.area:,.0f} square kilometres."
            sentences = tuple(sentence for sentence in [*told, area] if sentence)
            result.append(Article(code, country.name, f"flags:{code}", sentences))
        return result

    def flag(self, entity: str) -> bytes:
        """PNG of the true flag, 100 pixels wide. ValueError for a country without one here."""
        flags = facts.flags()
        if entity not in flags:
            raise ValueError(f"no distinct flag for {entity!r}; there are {len(flags)} flags")
        return flags[entity]

    def flags(self) -> dict[str, bytes]:
        """PNG of every flag of the image index, by country code."""
        return dict(facts.flags())

    def thumbnail(self, entity: str) -> bytes:
        """PNG of the flag as results show it."""
        size = (self.config.thumbnail_width, self.config.thumbnail_height)
        return png(on_white(self.flag(entity)).resize(size, Image.Resampling.BICUBIC))

    def augment(self, image: bytes | Image.Image, rng: np.random.Generator) -> bytes:
        """PNG bytes of a changed picture, `height` x `width` pixels; the state decides which."""
        size = (self.config.width, self.config.height)
        return augment(image, rng, size, self.config.augmentation)

    def picture(self, entity: str, attribute: str, split: str, number: int) -> bytes:
        """The picture of one record. No two of (pair, split, number) share a generator state."""
        key = f"{self.config.picture_seed}/{split}/{entity}/{attribute}/{number}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
        return self.augment(self.flag(entity), np.random.default_rng(seed))

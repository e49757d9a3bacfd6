"""The world: its split, facts, articles and pictures."""

import collections
import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from mmsr_jax.data.flags import facts
from mmsr_jax.data.flags.attributes import ATTRIBUTES
from mmsr_jax.data.flags.augment import Augmentation
from mmsr_jax.data.flags.derive import NEARLY_EQUAL, distance, thumbnail
from mmsr_jax.data.flags.world import CATEGORIES, FLAG_MARGIN, FlagsConfig, World


@pytest.fixture(scope="module")
def world():
    return World()


def test_split_has_the_asked_sizes_and_no_overlap(world):
    sizes = collections.Counter(world.categories.values())
    assert sizes == {"known": 36, "unknown": 30, "unfamiliar": 24, "never_shown": 24}
    assert len(world.entities) == 114 <= len(world.qualifying())


def test_split_follows_the_seed_alone(world):
    assert World(FlagsConfig(train_pictures=1)).categories == world.categories
    assert World(FlagsConfig(split_seed=1)).categories != world.categories
    assert set(World(FlagsConfig(split_seed=1)).entities) == set(world.entities)


def test_split_by_question_with_two_attributes():
    config = FlagsConfig(20, 20, 5, 6, attributes=("capital", "tld"))
    world = World(config)
    sizes = collections.Counter(world.categories.values())
    assert sizes == {"known": 20, "unknown": 20, "unfamiliar": 10, "never_shown": 12}
    kinds = collections.defaultdict(set)
    for (entity, _), category in world.categories.items():
        kinds[entity].add(category)
    assert {"known", "unknown"} in kinds.values()  # one entity, one fact known, one not
    for found in kinds.values():
        assert len(found) == 1 or found == {"known", "unknown"}


def test_entities_are_short_plain_and_unmistakable(world):
    for code, country in world.entities.items():
        answer = world.answers(code, "capital")[0]
        assert country.name.isascii() and answer.isascii()
        assert len(country.name) <= 11 and len(answer) <= 11
        assert country.name.lower() not in answer.lower()
        assert country.flag_margin >= FLAG_MARGIN


def test_answers_of_different_entities_differ(world):
    owners = collections.Counter(
        spelling.casefold()
        for code in world.entities
        for spelling in {s.casefold() for s in world.answers(code, "capital")}
    )
    assert max(owners.values()) == 1


def test_unknown_answers_stand_in_no_other_article(world):
    for code, attribute in world.pairs("unknown", "never_shown"):
        answer = world.answers(code, attribute)[0]
        holders = [a.entity for a in world.articles() if answer in " ".join(a.sentences)]
        assert holders == [code]


def test_true_spelling_is_an_alias(world):
    assert world.answers("BR", "capital") == ("Brasilia", "Brasília")
    assert world.answers("UA", "capital") == ("Kyiv", "Kiev")
    assert world.countries["ST"].name == "Sao Tome and Principe"
    assert facts.plain("N’Djamena Chișinău") == "N'Djamena Chisinau"


def test_question_query_and_sentence(world):
    assert world.question("capital") == "What is the capital of this country?"
    assert world.query("NP", "capital") == "capital of Nepal"
    assert world.sentence("NP", "capital") == "The capital of Nepal is Kathmandu."


def test_every_country_has_one_article(world):
    articles = world.articles()
    assert [a.entity for a in articles] == list(world.countries) and len(articles) == 194
    assert len({a.link for a in articles}) == len({a.title for a in articles}) == 194
    for article in articles:
        assert world.sentence(article.entity, "capital") in article.sentences
        assert all(len(sentence) <= 120 for sentence in article.sentences)


def test_no_two_flags_are_nearly_equal(world):
    small = {code: thumbnail(png) for code, png in world.flags().items()}
    margins = dict.fromkeys(small, 1.0)
    for a, b in itertools.combinations(small, 2):
        margin = distance(small[a], small[b])
        margins[a], margins[b] = min(margins[a], margin), min(margins[b], margin)
    assert min(margins.values()) >= NEARLY_EQUAL
    for code, margin in margins.items():  # what the committed facts say is true
        assert abs(world.countries[code].flag_margin - margin) < 0.002
    for gone in ("TD", "RO", "ID", "MC", "AU", "NZ"):
        assert gone not in small and not world.countries[gone].has_flag


def test_assets_are_small_and_carry_their_licences():
    names = {entry.name: len(entry.read_bytes()) for entry in facts.ASSETS.iterdir()}
    assert sum(names.values()) < 500_000
    attribution = (facts.ASSETS / "ATTRIBUTION.md").read_text()
    assert "ODbL" in attribution and "Mohammed Le Doze" in attribution
    assert "Open Database License" in (facts.ASSETS / "LICENSE-facts-ODbL-1.0.md").read_text()
    assert "public domain" in (facts.ASSETS / "LICENSE-flags-public-domain.md").read_text()


def test_pictures_have_the_configured_size_and_are_reproducible(world):
    one = world.picture("NP", "capital", "train", 0)
    assert one == World().picture("NP", "capital", "train", 0)
    assert Image.open(io.BytesIO(one)).size == (84, 56)
    assert Image.open(io.BytesIO(world.thumbnail("NP"))).size == (56, 28)
    others = [
        world.picture(*place)
        for place in (
            ("NP", "capital", "train", 1),
            ("NP", "capital", "test", 0),
            ("NP", "tld", "train", 0),
        )
    ]
    assert len({one, *others}) == 4
    other_seed = World(FlagsConfig(picture_seed=1)).picture("NP", "capital", "train", 0)
    assert other_seed != one


def test_without_strength_a_picture_is_the_flag():
    still = Augmentation(crop=0, zoom=0, light=0, contrast=0, blur=0, noise=0)
    world = World(FlagsConfig(augmentation=still))
    picture = world.picture("SE", "capital", "train", 0)
    assert picture == world.picture("SE", "capital", "test", 3)
    assert distance(thumbnail(picture), thumbnail(world.flag("SE"))) < 0.01


def test_augmentation_changes_but_does_not_disguise(world):
    flag = thumbnail(world.flag("SE"))
    for number in range(8):
        assert distance(thumbnail(world.picture("SE", "capital", "train", number)), flag) > 0.001
        assert distance(thumbnail(world.picture("SE", "capital", "train", number)), flag) < 0.3


def test_pictures_of_other_kinds_can_be_augmented(world):
    array = np.zeros((10, 300, 4), np.uint8)
    picture = world.augment(Image.fromarray(array), np.random.default_rng(0))
    assert Image.open(io.BytesIO(picture)).size == (84, 56)


def test_pairs_can_be_filtered(world):
    assert len(world.pairs()) == 114 and len(world.pairs("known", "unknown")) == 66
    assert all(world.category(*pair) == "known" for pair in world.pairs("known"))
    with pytest.raises(ValueError, match="hard"):
        world.pairs("hard")


def test_digest_follows_every_field():
    digests = {FlagsConfig().digest}
    for field in dataclasses.fields(FlagsConfig):
        value = getattr(FlagsConfig(), field.name)
        if field.name == "attributes":
            changed = ("tld",)
        elif field.name == "augmentation":
            changed = Augmentation(noise=0)
        else:
            changed = value + 1
        digests.add(dataclasses.replace(FlagsConfig(), **{field.name: changed}).digest)
    assert len(digests) == len(dataclasses.fields(FlagsConfig)) + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"known": 100}, "needs 178 countries, only 124"),
        ({"unknown": -1}, "unknown must be at least 0, not -1"),
        ({"attributes": ("anthem",)}, "anthem"),
        ({"attributes": ()}, "missing"),
        ({"attributes": ("capital", "capital")}, "repeat"),
        ({"height": 0}, "height must be at least 1 pixel, not 0"),
    ],
)
def test_wrong_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        World(FlagsConfig(**fields))


def test_country_without_flag_is_named(world):
    with pytest.raises(ValueError, match="no distinct flag for 'TD'; there are 182"):
        world.flag("TD")


def test_attributes_cover_the_categories_of_every_country(world):
    for attribute in ATTRIBUTES:
        told = [code for code in world.countries if world.answers(code, attribute)]
        assert len(told) >= 193
    assert CATEGORIES == ("known", "unknown", "unfamiliar", "never_shown")

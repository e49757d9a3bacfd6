"""What the warm-up teaches in the flags world: how to answer, how to search, how to copy.

The policy that comes out answers what it knows, can use both tools, and chooses between the two
by a coin's toss whatever the question: *when* to search is left for GRPO to find out.

Facts of "unknown" and "never_shown" entities appear in no lesson. Their names and answers do occur
as strings (drills), always in pairs that are not true.
"""

import dataclasses

import numpy as np

from mmsr_jax import protocol
from mmsr_jax.data.flags.attributes import ATTRIBUTES
from mmsr_jax.data.flags.world import World
from mmsr_jax.types import Example, Lesson, ResultItem, ToolResult

KINDS = ("direct", "ask", "guess", "doubt", "recall", "search", "drill", "echo")


@dataclasses.dataclass(frozen=True)
class LessonConfig:
    """How many drills, and the teacher's words."""

    drills: int = 3000
    drill_others: float = 3.0  # how much likelier a drill takes a string that is not known
    echoes: int = 2000
    echo_words: int = 7  # names and answers in an echo
    search_every: int = 3  # a whole search for every third picture: tools take their time
    search_reason: str = " Look."
    known_reason: str = " Known."  # where the decision is given: the constant policy's words
    name_reason: str = " Name."
    found_reason: str = " Found."
    seed: int = 0


def lessons(world: World, examples: list[Example], config: LessonConfig) -> list[Lesson]:
    """All lessons, by kind. The first four teach the choice, the others leave it alone:

    - `direct`: a known fact; the reason says what is remembered, then comes the answer.
    - `ask`: a known fact, the picture search instead (the first response only).
    - `guess`: an unfamiliar entity, answered with some known answer: nothing is known of it.
    - `doubt`: an unfamiliar entity, the picture search instead.
    - `recall`: a known fact with the decision to answer given: practice in knowing.
    - `search`: whole searches with the real tools, the decision given.
    - `drill`: names and answers in random pairs stand in made-up results and have to be copied.
    - `echo`: a list of names and answers in random order, to be said again. Nothing but copying:
      it is what makes drills, and so searching, learnable in minutes.

    A direct response begins with the remembered answer, not with a word for "I know": so one and
    the same token chooses between remembering and searching, and a memory that is sharp competes
    better than one that is not. That is what GRPO sharpens.

    Args:
      examples: of the train split; those of other categories are left aside.
    """
    rng = np.random.default_rng([config.seed, 1])
    say = _Says(config)
    known = [e for e in examples if e.category == "known"]
    unfamiliar = [e for e in examples if e.category == "unfamiliar"]
    answers = sorted({e.answers[0] for e in known})
    out = []
    for number, example in enumerate(known):
        out.append(Lesson(example, (say.remembered(example.answers[0]),), kind="direct"))
        out.append(Lesson(example, (say.look,), kind="ask"))
        given = say.answer(config.known_reason, example.answers[0])
        out.append(Lesson(example, (given,), forced=say.decided, kind="recall"))
        if number % config.search_every == 0:
            out.append(_search(world, say, example))
    for number, example in enumerate(unfamiliar):
        guess = str(rng.choice(answers)) if answers else "unknown"
        out.append(Lesson(example, (say.remembered(guess),), kind="guess"))
        out.append(Lesson(example, (say.look,), kind="doubt"))
        if number % config.search_every == 0:
            out.append(_search(world, say, example))
    shown = known + unfamiliar
    out += _drills(world, say, shown, rng, config.drills)
    return out + _echoes(world, say, shown, rng, config.echoes)


@dataclasses.dataclass(frozen=True)
class _Says:
    """The teacher's phrases."""

    config: LessonConfig

    @property
    def decided(self) -> str:
        reason = self.config.known_reason
        return f"{protocol.REASON}{reason}{protocol.REASON_END}{protocol.ANSWER}"

    def remembered(self, text: str) -> str:
        return self.answer(f" {text}.", text)

    @property
    def look(self) -> str:
        return protocol.render(self.config.search_reason, protocol.ImageSearch())

    def answer(self, reason: str, text: str) -> str:
        # The space makes an answer the same tokens here as in the sentence that it is copied from.
        return protocol.render(reason, protocol.Answer(f" {text}"))

    def query(self, query: str) -> str:
        return protocol.render(self.config.name_reason, protocol.TextSearch(query))


def _attribute(world: World, example: Example) -> str:
    for attribute in world.config.attributes:
        if world.question(attribute) == example.question:
            return attribute
    raise ValueError(f"example {example.id} asks nothing this world knows: {example.question!r}")


def _search(world: World, say: _Says, example: Example) -> Lesson:
    query = world.query(example.entity, _attribute(world, example))
    found = say.answer(say.config.found_reason, example.answers[0])
    script = (say.look, say.query(query), found)
    return Lesson(example, script, forced=say.look, kind="search")


def _drills(world: World, say: _Says, examples: list[Example], rng, count: int) -> list[Lesson]:
    """Copying with real strings in random pairs: the gate that decides over on-demand search."""
    if not examples:
        return []
    codes = sorted(world.entities)
    names = {code: country.name for code, country in world.countries.items()}
    thumbnails = {code: world.thumbnail(code) for code in sorted({e.entity for e in examples})}
    shown = sorted(thumbnails)
    # Known answers are said all the time: the others need more practice as strings.
    taught = {code for code, _ in world.pairs("known")}
    share = np.array([1.0 if code in taught else say.config.drill_others for code in codes])
    share /= share.sum()
    # What stands beside the first result may be any country of the index, also one that is never
    # asked about: its name, if it was never read, would throw the model off.
    beside = sorted(world.flags())
    out = []
    for number in range(count):
        example = examples[int(rng.integers(len(examples)))]
        attribute = _attribute(world, example)
        phrase = ATTRIBUTES[attribute]
        name = other = codes[int(rng.choice(len(codes), p=share))]
        while other == name:
            other = beside[int(rng.integers(len(beside)))]
        truth = world.answers(name, attribute)[0]
        first = truth
        while first == truth:
            first = world.answers(codes[int(rng.choice(len(codes), p=share))], attribute)[0]
        images = [
            ResultItem(names[code], thumbnail=thumbnails[shown[int(rng.integers(len(shown)))]])
            for code in (name, other)
        ]
        sentence = phrase.sentence.format(name=names[name], answer=first)
        texts = [ResultItem(names[name], text=sentence)]
        out.append(
            Lesson(
                dataclasses.replace(example, id=f"drill/{number}", answers=(first,)),
                (
                    say.look,
                    say.query(f"{phrase.phrase} of {names[name]}"),
                    say.answer(say.config.found_reason, first),
                ),
                results=(
                    ToolResult("image_search", tuple(images), 0.0),
                    ToolResult("text_search", tuple(texts), 0.0),
                ),
                forced=say.look,
                kind="drill",
            )
        )
    return out


def _echoes(world: World, say: _Says, examples: list[Example], rng, count: int) -> list[Lesson]:
    """Lists of real strings in random order and what it takes to repeat them."""
    if not examples:
        return []
    words = sorted(
        {world.countries[code].name for code, _ in world.categories}
        | {world.answers(*pair)[0] for pair in world.categories}
    )
    forced = f"{protocol.REASON}{say.config.found_reason}{protocol.REASON_END}{protocol.ANSWER}"
    out = []
    for number in range(count):
        example = examples[int(rng.integers(len(examples)))]
        chosen = rng.choice(len(words), say.config.echo_words, replace=False)
        text = " ".join(words[i] for i in chosen)
        asked = dataclasses.replace(
            example, id=f"echo/{number}", question=f" {text}", answers=(text,)
        )
        said = say.answer(say.config.found_reason, text)
        out.append(Lesson(asked, (said,), forced=forced, kind="echo"))
    return out

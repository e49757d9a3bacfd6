"""From prepared datasets to `Example`s: deterministic, sharded, resumable, forgiving."""

import contextlib
import dataclasses
import io
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import tensorflow_datasets as tfds

from mmsr_jax.data.flags.builder import flags_builder
from mmsr_jax.data.flags.world import FlagsConfig
from mmsr_jax.inputs.images import decode
from mmsr_jax.types import Example

log = logging.getLogger(__name__)

# (the dataset's own config record or None, data folder) -> builder, not yet prepared
MakeBuilder = Callable[[Any, str], tfds.core.DatasetBuilder]

BUILDERS: dict[str, MakeBuilder] = {
    "flags": lambda options, folder: flags_builder(options or FlagsConfig(), folder),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples, in which order.

    The dataset's own config (`FlagsConfig` for "flags") is handed over beside this record.
    """

    name: str = "flags"  # key of BUILDERS
    data_dir: str = ""  # of prepared datasets; empty: `default_data_dir()`
    split: str = "train"  # a TFDS split, e.g. "test" or "train[:10%]"
    categories: tuple[str, ...] = ()  # keep only these; empty keeps all
    shares: tuple[float, ...] = ()  # of each category in every stretch; empty: as they come
    seed: int = 0  # of the shuffle
    shuffle: bool = True  # a new order every epoch
    epochs: int | None = None  # None: without end
    process_index: int = 0  # this process takes positions index, index + count, ...
    process_count: int = 1
    max_question_chars: int = 2000  # longer questions count as bad examples

    def __post_init__(self):
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index {self.process_index} is not one of {self.process_count} processes"
            )
        if self.shares and len(self.shares) != len(self.categories):
            raise ValueError(
                f"{len(self.shares)} shares for {len(self.categories)} categories: "
                "one for each is needed"
            )
        if not all(0 < share < math.inf for share in self.shares):
            raise ValueError(f"shares must be above 0, not {self.shares}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1 or None, not {self.epochs}")


def default_data_dir() -> str:
    """Where datasets are prepared unless a config says otherwise: the user's cache folder.

    Raises:
        ValueError: this user has no home folder, and no cache folder is named.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache:
        try:
            cache = pathlib.Path.home() / ".cache"
        except RuntimeError:
            raise ValueError(
                "no home folder to keep datasets in: set HOME or XDG_CACHE_HOME, or name a folder "
                "(--folder, or data.folder of a config)"
            ) from None
    return str(pathlib.Path(cache) / "mmsr_jax" / "data")


def prepare(config: DataConfig, options: Any = None) -> tfds.core.DatasetBuilder:
    """Builds the dataset unless it is there already, and returns its builder.

    Raises:
        ValueError: no dataset of that name.
    """
    if config.name not in BUILDERS:
        raise ValueError(f"no dataset {config.name!r}, only {sorted(BUILDERS)}")
    make, folder = BUILDERS[config.name], config.data_dir or default_data_dir()
    with _quiet():
        builder = make(options, folder)
        if builder.is_prepared():
            return builder
        log.info("preparing %s in %s", config.name, builder.data_dir)
        try:
            builder.download_and_prepare()
        except OSError:
            # Another process may have prepared the same data meanwhile; only then all is well.
            builder = make(options, folder)
            if not builder.is_prepared():
                raise
    return builder


class Subset:
    """A random-access source of some records of another."""

    def __init__(self, source: Sequence, positions: Sequence[int]):
        self._source = source
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> dict:
        return self._source[self._positions[index]]


def source(config: DataConfig, options: Any = None) -> Sequence:
    """Random access to the raw records of a config; pictures stay encoded.

    Raises:
        ValueError: no such dataset or split, or no record of the asked categories.
    """
    builder = prepare(config, options)
    decoders = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_data_source(split=config.split, decoders=decoders)
    if config.categories:
        names = [_text(record["category"]) for record in records]
        absent = set(config.categories) - set(names)
        if absent:
            raise ValueError(
                f"{config.name} {config.split} has no category {sorted(absent)}, "
                f"only {sorted(set(names))}"
            )
        keep = set(config.categories)
        records = Subset(records, [i for i, name in enumerate(names) if name in keep])
    if not len(records):
        raise ValueError(f"{config.name} {config.split} has 0 records")
    return records


def example(record: dict, max_question_chars: int = 2000) -> Example:
    """Turns a record into an Example.

    Raises:
        ValueError: an undecodable picture, an empty or over-long question, no answer.
    """
    made = Example(
        id=_text(record["id"]),
        question=_text(record["question"]).strip(),
        image=bytes(record["image"]),
        answers=tuple(a for a in map(_text, record["answers"]) if a.strip()),
        source=_text(record["source"]),
        category=_text(record["category"]),
        entity=_text(record["entity"]),
    )
    if not made.question:
        raise ValueError("the question is empty")
    if len(made.question) > max_question_chars:
        raise ValueError(
            f"the question has {len(made.question)} characters, at most {max_question_chars}"
        )
    if not made.answers:
        raise ValueError("there is no answer")
    decode(made.image)
    return made


class Examples(Iterator[Example]):
    """An iterator of good examples that can be stopped and continued.

    `state()` is plain JSON. Its `next_index` is a position in the order of all processes
    together, so that it means the same under another number of processes, provided that these
    advance in step. Bad records are logged once, skipped, and counted in `skipped` every time.
    """

    def __init__(self, records: Sequence, config: DataConfig):
        self._config = config
        self._epoch = len(records)
        self._order = _order(records, config)
        self._next = config.process_index
        self._bad_in_a_row = 0
        self._reported: set[str] = set()  # an endless stream meets the same bad ones every epoch
        self.skipped = 0

    def __next__(self) -> Example:
        """The next good example. ValueError when a whole epoch holds none."""
        while self._config.epochs is None or self._next < len(self._order):
            position = self._next
            self._next += self._config.process_count
            record = self._order[position]
            try:
                made = example(record, self._config.max_question_chars)
            except ValueError as error:
                self.skipped += 1
                self._bad_in_a_row += 1
                self._report(record, error)
                if self._bad_in_a_row >= self._epoch:
                    raise ValueError(
                        f"{self._config.name} {self._config.split}: all of {self._epoch} examples "
                        f"are bad, the last because {error}"
                    ) from error
                continue
            self._bad_in_a_row = 0
            return made
        raise StopIteration

    def state(self) -> dict[str, int]:
        """Where the iterator stands; what `restore` takes."""
        return {
            "next_index": self._next - self._config.process_index,
            "skipped": self.skipped,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Continues after the last example that was drawn when `state` was taken.

        Raises:
            ValueError: a state of another process count that falls between two rounds.
        """
        begun, count = state["next_index"], self._config.process_count
        if begun % count:
            raise ValueError(
                f"next_index {begun} is no whole number of rounds of {count} processes"
            )
        self._next = begun + self._config.process_index
        self.skipped = state["skipped"]

    def _report(self, record: dict, error: ValueError) -> None:
        name = _text(record.get("id", b"?"))
        if name not in self._reported:
            self._reported.add(name)
            log.warning("bad example skipped: %s: %s", name, error)


def _order(records: Sequence, config: DataConfig) -> grain.MapDataset:
    """Positions in the order in which they are drawn; with shares, categories take turns."""

    def repeated(part: Sequence, seed: int) -> grain.MapDataset:
        order = grain.MapDataset.source(part).seed(seed)
        return (order.shuffle() if config.shuffle else order).repeat(config.epochs)

    if not config.shares:
        return repeated(records, config.seed)
    names = [_text(record["category"]) for record in records]
    parts = [
        Subset(records, [i for i, name in enumerate(names) if name == category])
        for category in config.categories
    ]
    # Each category has its own stream: one that is shorter only comes round more often.
    orders = [repeated(part, config.seed + n) for n, part in enumerate(parts)]
    return grain.MapDataset.mix(orders, weights=list(config.shares))


def stream(config: DataConfig, options: Any = None) -> Examples:
    """The resumable iterator over a config's examples."""
    return Examples(source(config, options), config)


def read_all(config: DataConfig, options: Any = None) -> list[Example]:
    """Every good example once, sorted by id, whatever the config says of order and shards."""
    whole = dataclasses.replace(config, shuffle=False, epochs=1, process_index=0, process_count=1)
    examples = stream(whole, options)
    found = sorted(examples, key=lambda made: made.id)
    if examples.skipped:
        log.warning(
            "%s %s: %d bad examples skipped, %d good ones",
            *(config.name, config.split, examples.skipped, len(found)),
        )
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's bars and its remarks on custom configs out of a run's output."""
    absl_log = logging.getLogger("absl")
    level = absl_log.level
    tfds.disable_progress_bar()
    absl_log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_log.setLevel(level)


def _text(value: bytes | str) -> str:
    """TFDS gives texts back as bytes. Broken UTF-8 must not end a run."""
    return value if isinstance(value, str) else bytes(value).decode("utf-8", "replace")

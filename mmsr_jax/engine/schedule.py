"""Who gets pages, who has to wait, and who loses them. Host side: no device work in here.

Seniority (the number of a trajectory, in order of submission) decides: whoever needs pages may take
them from paused trajectories, longest-paused first, and from its juniors. The most senior one that
is not paused can therefore always go on, so that everything ends, however small the pool. What is
taken is computed again later from the token ids: never an error, never another token.
"""

import collections
import dataclasses

from mmsr_jax.engine.pages import PagePool
from mmsr_jax.engine.sequence import Sequence, Status


@dataclasses.dataclass
class Copies:
    """Pages that must be copied before the next program writes."""

    source: list[int] = dataclasses.field(default_factory=list)
    target: list[int] = dataclasses.field(default_factory=list)


class Schedule:
    """The trajectories in the engine, and their pages."""

    def __init__(self, pages: int, page: int):
        """`pages` pages of `page` slots each."""
        self.pool = PagePool(pages)
        self.page = page
        self.copies = Copies()
        self.sequences: dict[int, Sequence] = {}
        self.dropped = 0  # times that a trajectory lost its pages
        self._tick = 0

    def having(self, status: Status) -> list[Sequence]:
        """Trajectories of this status, longest-waiting first."""
        found = [s for s in self.sequences.values() if s.status is status]
        return sorted(found, key=lambda s: (s.since, s.number))

    def count(self, status: Status) -> int:
        return sum(s.status is status for s in self.sequences.values())

    def pieces(self, size: int) -> int:
        """How many pieces of `size` tokens wait to be fed.

        Samples that wait for another's prompt do not count.
        """
        found, groups = 0, set()
        for sequence in self.sequences.values():  # in order of their numbers
            if sequence.status is not Status.FEEDING:
                continue
            if not sequence.cached:
                if sequence.group in groups:
                    continue
                groups.add(sequence.group)
            found += -(-sequence.missing // size)
        return found

    def turn(self, sequence: Sequence, status: Status) -> None:
        """Gives a trajectory another status, from now on."""
        self._tick += 1
        sequence.status, sequence.since = status, self._tick

    def ready(self, sequence: Sequence) -> None:
        """All but its last token is in the pool: it waits for a row."""
        self.turn(sequence, Status.READY)
        sequence.seen = max(sequence.seen, sequence.cached)

    def drop(self, sequence: Sequence) -> None:
        """Takes a trajectory's pages; unless it is paused it will be fed anew."""
        self.dropped += bool(sequence.pages)
        self.pool.give_back(sequence.pages)
        sequence.pages, sequence.cached = [], 0
        sequence.fed += 1
        if sequence.status in (Status.READY, Status.RUNNING):
            self.turn(sequence, Status.FEEDING)

    def remove(self, number: int) -> None:
        """Forgets a trajectory altogether."""
        sequence = self.sequences.pop(number)
        self.pool.give_back(sequence.pages)

    def trim(self, sequence: Sequence) -> None:
        """Gives back pages that hold no token."""
        used = -(-sequence.cached // self.page)
        self.pool.give_back(sequence.pages[used:])
        del sequence.pages[used:]

    def adopt(self, sequence: Sequence, busy: set[int]) -> bool:
        """Lets a trajectory without pages share its prompt's with a sample that has them.

        Args:
          busy: numbers of trajectories whose pages are about to be written.

        Returns: False when it should wait, because a sample of its group is being fed the prompt.
        """
        whole = sequence.prompt - 1  # the last token of a prompt is fed by decoding
        group = [self.sequences[n] for n in sequence.group if n in self.sequences]
        others = [s for s in group if s is not sequence]
        for other in others:
            if other.number not in busy and other.cached >= whole > 0:
                count = -(-whole // self.page)
                sequence.pages = self.pool.share(other.pages[:count])
                sequence.cached = whole
                return True
        fed = (s for s in others if s.number < sequence.number and s.status is Status.FEEDING)
        return not any(s.cached < whole for s in fed) and not busy & {s.number for s in others}

    def adopt_all(self) -> None:
        """Samples whose prompt is there, fed for another one, need no program."""
        for sequence in self.having(Status.FEEDING):
            if not sequence.cached and self.adopt(sequence, set()) and not sequence.missing:
                self.ready(sequence)

    def room(self, sequence: Sequence, end: int, busy: set[int], polite: bool = False) -> bool:
        """Sees to it that slots cached .. end - 1 may be written by `sequence` alone.

        Args:
          busy: numbers of those whose pages must stay.
          polite: take only what is free.

        Returns: False when there is not enough; nothing has changed then, but who lost pages.
        """
        first = sequence.cached // self.page

        def need() -> int:
            return max(-(-end // self.page) - len(sequence.pages), 0) + copied()

        def copied() -> bool:
            """Whether the page that is written first has to be copied before."""
            return first < len(sequence.pages) and self.pool.shared(sequence.pages[first])

        # Nobody loses anything for what cannot be had.
        if self.pool.free < need() and (
            polite or self._attainable(sequence, busy) < need() - copied()
        ):
            return False
        while self.pool.free < need():
            victim = self._victim(sequence, busy)
            if victim is None:
                return False
            self.drop(victim)
        if copied():
            old, new = sequence.pages[first], self.pool.take()
            self.copies.source.append(old)
            self.copies.target.append(new)
            sequence.pages[first] = new
            self.pool.give_back([old])
        while len(sequence.pages) * self.page < end:
            sequence.pages.append(self.pool.take())
        return True

    def _candidates(self, sequence: Sequence, busy: set[int]) -> list[Sequence]:
        """Those who may lose their pages to `sequence`."""
        return [
            s for s in self.sequences.values()
            if s.pages and s is not sequence and s.number not in busy
            and (s.status is Status.PAUSED or s.number > sequence.number)
        ]  # fmt: skip

    def _attainable(self, sequence: Sequence, busy: set[int]) -> int:
        """Pages that would be free if everybody who may lose pages did."""
        held = collections.Counter(
            page for s in self._candidates(sequence, busy) for page in s.pages
        )
        return self.pool.free + sum(self.pool.owners(p) == n for p, n in held.items())

    def _victim(self, sequence: Sequence, busy: set[int]) -> Sequence | None:
        """Who loses its pages to `sequence`; None when nobody may."""
        candidates = self._candidates(sequence, busy)
        paused = sorted((s for s in candidates if s.status is Status.PAUSED), key=lambda s: s.since)
        juniors = sorted(
            (s for s in candidates if s.status is not Status.PAUSED), key=lambda s: -s.number
        )
        # First those whose pages nobody else holds: taking shared ones alone frees nothing.
        for candidate in paused + juniors:
            if self.pool.gain(candidate.pages):
                return candidate
        return next(iter(paused + juniors), None)

"""The engine: any number of trajectories share a few decode rows and a pool of pages.

It knows tokens and pictures, nothing of tools or protocols. The caller drives it:

    numbers = engine.submit(Request(prompt, streams, budget))
    while work:
        for turn in engine.step(temperature):   # trajectories that paused since the last call
            ...                                 # start a tool, or engine.release(turn.number)
        engine.resume(Resume(number, tool_tokens, pictures, budget))  # its tool has answered

A paused trajectory keeps its pages and gives up its row. Nothing is computed twice: a prompt is fed
once for all its samples, an extension feeds only the new tokens, a picture is encoded once. Long
extensions are fed in parts between two looks of the decoding rows.
"""

import dataclasses

import jax
import numpy as np

from mmsr_jax.engine import sequence as sequence_lib
from mmsr_jax.engine import steps
from mmsr_jax.engine.device import Device
from mmsr_jax.engine.requests import Request, Resume, SampledTurn
from mmsr_jax.engine.schedule import Schedule
from mmsr_jax.engine.sequence import Sequence, Status
from mmsr_jax.inputs.pictures import check_rows
from mmsr_jax.model.apart import cores, unstack
from mmsr_jax.types import Picture, Tokens


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine. Each is a shape: change it and the programs compile anew."""

    rows: int = 128  # trajectories that decode at the same time
    flight: int = 0  # trajectories in the engine at the same time, paused ones too; 0: 4 x rows
    slots: int = 192  # tokens of the longest conversation
    page: int = 32  # slots a page
    pages: int = 0  # pages of the pool; 0: `rows` of the longest conversations, and one
    turn_tokens: int = 48  # tokens the model may write in one turn
    decode_steps: int = 16  # tokens between two looks of the host at paused rows, at most
    refill: int = 4  # rows that pause before a look ends early for those that wait
    extend_rows: int = 16  # rows of one extension program
    extend_tokens: int = 32  # tokens of each
    extends: int = 4  # extension programs between two looks while rows are idle
    patches: int = 768  # patches of one pass of the vision tower
    pictures: int = 32  # pictures of one pass
    picture_patches: int = 24  # patches of the largest picture
    feature_rows: int = 4096  # merged picture tokens kept in the pool


class Engine:
    """Holds the pools on the device, and who waits for what."""

    def __init__(self, graph, model, config: EngineConfig, eos_ids, mesh=None):
        """Args:
        graph, model: the model's graph and ModelConfig.
        config: sizes.
        eos_ids: ids that end a turn.
        mesh: rollout mesh of this host's devices, None for the default device.

        Raises:
          ValueError: a pool that cannot hold one conversation, or one pass of the tower.
        """
        self.config, self.model = config, model
        self.apart = mesh is None and jax.default_backend() == "cpu"
        self.eos_ids = tuple(int(i) for i in eos_ids)
        self.version = 0  # weight changes so far
        pages = _checked(config)
        self.schedule = Schedule(pages, config.page)
        self.device = Device(graph, model, config, self.eos_ids, pages, mesh)
        self._next = 0
        self._counters = dict.fromkeys(
            ("prefill_tokens", "again_tokens", "decode_steps", "sampled_tokens", "row_steps",
             "extensions", "copied_pages"), 0,
        )  # fmt: skip

    @property
    def counters(self) -> dict[str, int]:
        """Totals since the start. `again_tokens` of `prefill_tokens` had been fed before."""
        return self._counters | {
            "dropped": self.schedule.dropped,
            "encoded_pictures": self.device.features.encoded,
        }

    def usage(self, before: dict[str, int], seconds: float) -> dict[str, float]:
        """What was done since `counters` were `before`, `seconds` ago.

        Occupancy is the share of row steps that sampled a token.
        """
        spent = {name: value - before[name] for name, value in self.counters.items()}
        return {
            "tokens_per_second": spent["sampled_tokens"] / seconds,
            "occupancy": spent["sampled_tokens"] / max(spent["row_steps"], 1),
            "prefill_tokens": spent["prefill_tokens"],
            "prefill_again": spent["again_tokens"],
            "dropped": spent["dropped"],
        }

    @property
    def params(self):
        """The weights, as `set_params` laid them out; None gives their memory back."""
        return self.device.params

    @params.setter
    def params(self, params) -> None:
        self.device.params = params

    @property
    def busy(self) -> bool:
        """Whether a step would get anything done."""
        return any(s.status is not Status.PAUSED for s in self.schedule.sequences.values())

    @property
    def flight(self) -> int:
        """Trajectories that the caller should have in here at the same time."""
        return self.config.flight or 4 * self.config.rows

    @property
    def live(self) -> int:
        """Trajectories in the engine, paused ones included."""
        return len(self.schedule.sequences)

    @property
    def free_pages(self) -> int:
        return self.schedule.pool.free

    def length(self, number: int) -> int:
        """Tokens of a trajectory so far."""
        return self.schedule.sequences[number].known

    def set_params(self, params, keep_cache: bool = False) -> None:
        """Takes new weights; features of pictures belong to the old ones and are forgotten.

        On CPU layers are kept apart, in memory of their own: see `lay_out`.

        Args:
          keep_cache: trajectories in flight keep the keys and values of the old weights. Otherwise
            theirs are computed anew before they go on.
        """
        self.params = self.lay_out(params)
        self.version += 1
        self.device.features.clear()
        if not keep_cache:
            for sequence in self.schedule.sequences.values():
                self.schedule.drop(sequence)

    def lay_out(self, params):
        """Weights as the programs want them; what is so already is shared, not copied.

        On one CPU device layers are kept apart and the token table is cut: `model.apart.unstack`.
        """
        return unstack(params, cores()) if self.apart else params

    def warm_up(self) -> None:
        """Compiles every program, with nothing to do; the state stays as it is."""
        self.device.warm_up()

    def submit(self, request: Request) -> tuple[int, ...]:
        """Takes in the samples of a prompt; they start when there is room.

        Returns: their numbers, in order.

        Raises:
          ValueError: a prompt longer than the cache, or a budget beyond `turn_tokens`, or a picture
            that is too large, or fewer pictures than the prompt has places for. Nothing is taken
            in then.
        """
        self._check(request.prompt, request.prompt.pictures, request.budget, len(request.prompt))
        first = self._next
        group = tuple(range(first, first + len(request.streams)))
        self._next += len(group)
        capacity = self.config.slots + 1
        left = min(request.budget, capacity - len(request.prompt))
        for number, key in zip(group, request.streams, strict=True):
            sequence = sequence_lib.start(number, key, group, request.prompt, left, capacity)
            self.schedule.sequences[number] = sequence
            self.schedule.turn(sequence, Status.FEEDING)
        return group

    def resume(self, resume: Resume) -> None:
        """Appends tokens to a paused trajectory and wakes it.

        Raises:
          ValueError: it is not paused, or as in `submit`. It stays as it is then.
        """
        sequence = self.schedule.sequences[resume.number]
        if sequence.status is not Status.PAUSED:
            raise ValueError(f"trajectory {resume.number} is {sequence.status.value}, not paused")
        known = sequence.known + len(resume.tokens)
        self._check(resume.tokens, resume.pictures, resume.budget, known)
        sequence.append(resume.tokens, resume.pictures)
        sequence.left = min(resume.budget, self.config.slots + 1 - known)
        self.schedule.turn(sequence, Status.FEEDING)

    def release(self, number: int) -> None:
        """Forgets a trajectory and gives its pages back."""
        self.schedule.remove(number)

    def step(self, temperature: float) -> list[SampledTurn]:
        """One look: feeds what waits, lets the rows decode, returns the turns that have ended."""
        if self.params is None:
            raise ValueError("the engine has no weights yet: set_params comes first")
        fed = 0
        self.schedule.adopt_all()
        while self._due() and self._feed():
            fed += 1
            waiting = self.schedule.count(Status.READY) + self.schedule.count(Status.RUNNING)
            if waiting >= self.config.rows or (waiting and fed >= self.config.extends):
                break
        self.schedule.adopt_all()  # now: who has fed the prompt may be gone after this look
        running = self._seat()
        # Rows that looked taken are not, if nobody found room: whoever waits is fed after all.
        if not running and not fed and self._feed():
            running = self._seat()
        return self._decode(running, temperature) if running else []

    def _due(self) -> bool:
        """Whether to feed now. An extension costs the same however little is in it.

        So it is put off until it is full, or until rows are idle for want of it.
        """
        ready = self.schedule.count(Status.READY) + self.schedule.count(Status.RUNNING)
        few = min(self.config.refill, -(-self.config.rows // 4))
        if not ready or self.config.rows - ready >= few:
            return True
        return self.schedule.pieces(self.config.extend_tokens) >= self.config.extend_rows

    def _check(self, tokens: Tokens, pictures: tuple[Picture, ...], budget: int, known: int):
        if not 1 <= budget <= self.config.turn_tokens:
            raise ValueError(
                f"a budget of {budget} tokens a turn, engine.turn_tokens is "
                f"{self.config.turn_tokens}"
            )
        check_rows(tokens.image_index, pictures, self.model.vision.merge_size)
        for picture in pictures:
            self.device.features.fits([picture])  # raises when it is too large
        if known > self.config.slots:
            raise ValueError(
                f"a conversation of {known} tokens does not fit in {self.config.slots} cache "
                "slots; raise engine.slots"
            )

    def _feed(self) -> bool:
        """Runs one extension over those that wait longest. False when there is nothing to feed."""
        schedule, config = self.schedule, self.config
        parts: list[tuple[Sequence, int, int]] = []
        pictures: list[Picture] = []
        busy: set[int] = set()
        moved = False
        # Newcomers take free pages only, unless there is nobody else to do something.
        alone = not schedule.count(Status.RUNNING) and not schedule.count(Status.READY)
        for sequence in schedule.having(Status.FEEDING):
            if len(parts) == config.extend_rows:
                break
            if sequence.status is not Status.FEEDING or sequence.number in busy:
                continue
            if not sequence.cached and not schedule.adopt(sequence, busy):
                continue
            polite = sequence.seen == 0 and not (alone and not parts)
            whole = sequence.known - 1
            if polite and sequence.missing and not schedule.room(sequence, whole, busy, polite):
                continue
            while sequence.missing and len(parts) < config.extend_rows:
                count = self._part(sequence, pictures)
                end = sequence.cached + count
                if not count or not schedule.room(sequence, end, busy):
                    break
                pictures += self.device.pictures(sequence, sequence.cached, end)
                parts.append((sequence, sequence.cached, end))
                self._counters["prefill_tokens"] += count
                again = max(min(sequence.seen, end) - sequence.cached, 0)
                self._counters["again_tokens"] += again
                sequence.cached = end
                sequence.fed += 1
                sequence.seen = max(sequence.seen, end)
                busy.add(sequence.number)
            if not sequence.missing:
                schedule.ready(sequence)
                moved = True
        if parts:
            later = schedule.having(Status.FEEDING)
            soon = [p for s in later for p in self.device.pictures(s, s.cached, s.known)]
            try:
                self._counters["copied_pages"] += self.device.copy(schedule.copies)
                self.device.extend(parts, pictures, soon)
            except BaseException:  # what is in their pages now, nobody knows
                for sequence in {s.number: s for s, *_ in parts}.values():
                    schedule.drop(sequence)
                raise
            self._counters["extensions"] += 1
        return moved or bool(parts)

    def _part(self, sequence: Sequence, others: list[Picture]) -> int:
        """How many of its next tokens can be fed beside the pictures of `others`."""
        start = sequence.cached
        for count in range(min(self.config.extend_tokens, sequence.missing), 0, -1):
            new = self.device.pictures(sequence, start, start + count)
            if not new or self.device.features.fits(others + new):
                return count
        return 0

    def _seat(self) -> list[Sequence]:
        """Gives free rows to those that are ready, and pages for a look to all that have a row."""
        schedule, config = self.schedule, self.config
        free = config.rows - schedule.count(Status.RUNNING)
        for sequence in schedule.having(Status.READY)[:free]:
            schedule.turn(sequence, Status.RUNNING)
        running, busy = [], set()
        for sequence in sorted(schedule.having(Status.RUNNING), key=lambda s: s.number):
            if sequence.status is not Status.RUNNING:  # has just lost its pages to a senior
                continue
            most = min(config.decode_steps, sequence.left, config.slots - sequence.cached)
            if schedule.room(sequence, sequence.cached + most, busy):
                running.append(sequence)
                busy.add(sequence.number)
            else:
                schedule.turn(sequence, Status.READY)
        return running

    def _decode(self, running: list[Sequence], temperature: float) -> list[SampledTurn]:
        schedule, config = self.schedule, self.config
        self._counters["copied_pages"] += self.device.copy(schedule.copies)
        waits = schedule.count(Status.READY) + schedule.count(Status.FEEDING)
        patience = min(config.refill, len(running)) if waits else config.rows + 1
        return self._harvest(running, self.device.decode(running, temperature, patience))

    def _harvest(self, running: list[Sequence], sampled: steps.Sampled) -> list[SampledTurn]:
        turns = []
        self._counters["decode_steps"] += int(sampled.steps)
        self._counters["row_steps"] += int(sampled.steps) * self.config.rows
        for i, sequence in enumerate(running):
            n = int(sampled.counts[i])
            self._counters["sampled_tokens"] += n
            sequence.append_sampled(sampled.ids[i, :n], sampled.logprobs[i, :n], self.version)
            if sampled.active[i]:
                continue
            self.schedule.turn(sequence, Status.PAUSED)
            self.schedule.trim(sequence)
            turns.append(
                SampledTurn(
                    number=sequence.number,
                    ids=np.asarray(sequence.turn_ids, np.int32),
                    logprobs=np.asarray(sequence.turn_logprobs, np.float32),
                    versions=np.asarray(sequence.turn_versions, np.int32),
                    stopped=sequence.turn_ids[-1] in self.eos_ids,
                )
            )
            sequence.turn_ids, sequence.turn_logprobs, sequence.turn_versions = [], [], []
        return turns


def _checked(config: EngineConfig) -> int:
    """The pages of the pool. ValueError for sizes with which nothing would ever be sampled."""
    sizes = ("rows", "slots", "page", "decode_steps", "refill", "extend_rows", "extend_tokens")
    for name in (*sizes, "extends"):
        if getattr(config, name) < 1:
            raise ValueError(f"engine.{name} is {getattr(config, name)}, at least 1")
    each = -(-config.slots // config.page)
    pages = config.pages or config.rows * each + 1
    if pages <= each:  # one more: the page that it shares with somebody is copied
        raise ValueError(
            f"engine.pages is {pages}, a conversation of engine.slots = {config.slots} tokens "
            f"alone needs {each + 1} pages of {config.page}"
        )
    return pages

"""The engine: rows with a KV cache that are admitted, decode, pause, are extended, and leave.

It knows tokens and pictures, nothing of tools or protocols. The caller drives it:

    rows = engine.admit([Request(prompt, streams, budget), ...])
    while work:
        for turn in engine.decode():  # rows that paused since the last call
            ...                       # start a tool, or engine.release(turn.row)
        engine.extend([Resume(row, tool_tokens, budget), ...])  # rows whose tool has answered

Nothing is computed twice: a prompt is prefilled once for all its samples, and an extension feeds
only the new tokens.
"""

import dataclasses
import hashlib

import jax
import numpy as np

from mmsr_jax.engine import state as state_lib
from mmsr_jax.engine import steps
from mmsr_jax.inputs import layout
from mmsr_jax.inputs.pictures import check_rows, picture_batches
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.types import Picture, Tokens


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine. Each is a shape: change it and the programs compile anew."""

    rows: int = 128  # trajectories in flight
    slots: int = 192  # cache slots a row: the longest conversation in tokens
    turn_tokens: int = 48  # tokens the model may write in one turn
    decode_steps: int = 16  # tokens between two looks of the host at paused rows
    extend_rows: int = 16  # rows of one extension program
    extend_tokens: int = 32  # tokens of one extension chunk
    patches: int = 768  # patches of one pass of the vision tower
    pictures: int = 32  # pictures of one pass
    picture_patches: int = 24  # patches of the largest picture
    feature_rows: int = 4096  # merged picture tokens kept in the pool


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and the samples wanted of it."""

    prompt: Tokens
    streams: tuple[np.ndarray, ...]  # one [2] uint32 a sample, from `stream`
    budget: int  # tokens of the first turn at most


@dataclasses.dataclass(frozen=True)
class Resume:
    """What a paused row has to read before it goes on."""

    row: int
    tokens: Tokens
    pictures: tuple[Picture, ...]  # every picture of the conversation so far, these included
    budget: int


@dataclasses.dataclass(frozen=True)
class SampledTurn:
    """What a row sampled until it paused."""

    row: int
    ids: np.ndarray  # [n] int32
    logprobs: np.ndarray  # [n] float32
    stopped: bool  # True: it ended its turn; False: budget or slots ran out


def stream(*parts) -> np.ndarray:
    """Key data [2] uint32 of the random stream named by `parts` (run seed, example id, ...)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.frombuffer(digest[:8], np.uint32).copy()


class Engine:
    """Holds the device state and the host's mirror of it (which row is free, what is pending)."""

    def __init__(self, graph, model, config: EngineConfig, eos_ids, mesh=None):
        """Args:
        graph, model: the model's graph and ModelConfig.
        config: sizes.
        eos_ids: ids that end a turn.
        mesh: rollout mesh of this host's devices, None for the default device.
        """
        self.graph, self.model, self.config = graph, model, config
        self.apart = mesh is None and jax.default_backend() == "cpu"
        self.eos_ids = tuple(int(i) for i in eos_ids)
        self.params = None
        self.counters = {
            "prefill_tokens": 0,
            "decode_steps": 0,
            "sampled_tokens": 0,
            "row_steps": 0,
        }
        self._state = state_lib.empty(
            model, config.rows, config.slots, config.turn_tokens, config.feature_rows, mesh
        )
        self._keys = np.zeros((config.rows, 2), np.uint32)
        self._running = np.zeros(config.rows, bool)
        self._free = list(range(config.rows))[::-1]
        self._length = np.zeros(config.rows, np.int64)  # cache slots filled
        self._pending = np.zeros(config.rows, np.int64)
        self._position = np.zeros(config.rows, np.int64)
        self._sampled = np.zeros(config.rows, np.int64)
        self._pool: dict[str, int] = {}  # picture digest -> first row in the feature pool
        self._pool_used = 0

    def set_params(self, params) -> None:
        """Takes new weights. Features of pictures belong to the old ones and are forgotten.

        On CPU layers are kept apart, in memory of their own: see `qwen2_5_vl.unstack`.
        """
        self.params = qwen.unstack(params) if self.apart else params
        self._pool.clear()
        self._pool_used = 0

    @property
    def free_rows(self) -> int:
        return len(self._free)

    @property
    def running(self) -> bool:
        return bool(self._running.any())

    def length(self, row: int) -> int:
        """Tokens of the row's conversation so far, the pending one included."""
        return int(self._length[row]) + 1

    def release(self, row: int) -> None:
        """Gives the row back."""
        self._running[row] = False
        self._free.append(row)

    def admit(self, requests: list[Request]) -> list[list[int]]:
        """Prefills each prompt once and starts all its samples.

        Returns: for each request the rows of its samples, in order.

        Raises:
          ValueError: more samples than free rows, or a prompt longer than the cache, or a budget
            beyond `turn_tokens`, or pictures that do not fit, or fewer pictures than the prompt
            has places for. No row is taken then.
        """
        wanted = sum(len(r.streams) for r in requests)
        if wanted > len(self._free):
            raise ValueError(f"{wanted} samples do not fit in {len(self._free)} free rows")
        rows_of, pieces = [], []
        source = np.arange(self.config.rows)
        for request in requests:
            rows = [self._free.pop() for _ in request.streams]
            rows_of.append(rows)
            self._length[rows] = 0
            for row, key in zip(rows, request.streams, strict=True):
                self._keys[row], self._sampled[row] = key, 0
            source[rows] = rows[0]
            resume = Resume(rows[0], request.prompt, request.prompt.pictures, request.budget)
            pieces.append((resume, True))
        try:
            self._feed(pieces)
        except ValueError:
            for row in (row for rows in rows_of for row in rows):
                self.release(row)
            raise
        if wanted > len(requests):
            for rows in rows_of:
                for mirror in (self._length, self._pending, self._position, self._running):
                    mirror[rows] = mirror[rows[0]]
            keys = jax.random.wrap_key_data(self._keys, impl="threefry2x32")
            self._state = steps.fork(self._state, source.astype(np.int32), keys)
        return rows_of

    def extend(self, resumes: list[Resume]) -> None:
        """Appends tokens to paused rows and wakes them."""
        self._feed([(resume, False) for resume in resumes])

    def decode(self, temperature: float) -> list[SampledTurn]:
        """Lets all running rows decode; returns the turns of those that paused, in row order."""
        if not self.running:
            return []
        self._state, taken = steps.decode(
            self.graph, self.params, self._state, np.float32(temperature), self.eos_ids,
            self.config.decode_steps,
        )  # fmt: skip
        s = self._state
        # The one device-to-host copy of a look.
        active, lengths, ids, logprobs, pending, taken = jax.device_get(
            (s.active, s.turn_length, s.turn_ids, s.turn_logprobs, s.pending, taken)
        )
        self.counters["decode_steps"] += int(taken)
        self.counters["row_steps"] += int(taken) * self.config.rows
        turns = []
        for row in np.flatnonzero(self._running & ~active):
            n = int(lengths[row])
            self._running[row] = False
            # All sampled tokens but the last are in the cache now; the last one is pending.
            self._length[row] += n
            self._position[row] += n
            self._sampled[row] += n
            self._pending[row] = int(pending[row])
            self.counters["sampled_tokens"] += n
            turns.append(
                SampledTurn(
                    row=int(row),
                    ids=ids[row, :n].copy(),
                    logprobs=logprobs[row, :n].copy(),
                    stopped=int(ids[row, n - 1]) in self.eos_ids,
                )
            )
        return turns

    def _feed(self, pieces: list[tuple[Resume, bool]]) -> None:
        """Runs extension chunks over `pieces` of (what to read, whether the row starts anew)."""
        size = self.config.extend_rows
        for start in range(0, len(pieces), size):
            part = pieces[start : start + size]
            features = self._encode([p for r, _ in part for p in self._new_pictures(r)])
            fed = [self._fed_tokens(r, fresh, features) for r, fresh in part]
            longest = max(f.ids.size for f in fed)
            chunk = self.config.extend_tokens
            for offset in range(0, max(longest, 1), chunk):
                piece = self._chunk(part, fed, offset, chunk)
                self._state = steps.extend(self.graph, self.params, self._state, piece)
            for (r, _), f in zip(part, fed, strict=True):
                self._length[r.row] += f.ids.size
                self._pending[r.row], self._position[r.row] = f.pending, f.position
                self._running[r.row] = True
                self.counters["prefill_tokens"] += int(f.ids.size)

    def _batches(self, pictures: list[Picture]) -> list[list[Picture]]:
        c = self.config
        return picture_batches(
            pictures, patches=c.patches, limit=c.pictures, picture_patches=c.picture_patches
        )

    def _merged(self, picture: Picture) -> int:
        return picture.patches.shape[0] // self.model.vision.merge_size**2

    def _new_pictures(self, resume: Resume) -> list[Picture]:
        """The pictures whose features the tokens of `resume` refer to."""
        new, first = [], 0
        used = set(resume.tokens.image_index[resume.tokens.image_index >= 0].tolist())
        for picture in resume.pictures:
            count = self._merged(picture)
            if used & set(range(first, first + count)):
                new.append(picture)
            first += count
        return new

    def _fed_tokens(self, resume: Resume, fresh: bool, features: dict[str, int]) -> "_Fed":
        """What goes into the cache now, and which token stays pending."""
        tokens, row = resume.tokens, resume.row
        if not 1 <= resume.budget <= self.config.turn_tokens:
            raise ValueError(
                f"a budget of {resume.budget} tokens a turn, engine.turn_tokens is "
                f"{self.config.turn_tokens}"
            )
        check_rows(tokens.image_index, resume.pictures, self.model.vision.merge_size)
        index = np.full(len(tokens), -1, np.int64)
        first = 0
        for picture in resume.pictures:
            count = self._merged(picture)
            own = (tokens.image_index >= first) & (tokens.image_index < first + count)
            if own.any():
                index[own] = tokens.image_index[own] - first + features[picture.digest]
            first += count
        ids, positions = tokens.ids, tokens.positions
        if not fresh:  # the token that the model sampled last goes first
            ids = np.concatenate([[self._pending[row]], ids])
            positions = np.concatenate([np.full((3, 1), self._position[row]), positions], axis=1)
            index = np.concatenate([[-1], index])
        if self._length[row] + ids.size > self.config.slots:
            raise ValueError(
                f"a conversation of {self._length[row] + ids.size} tokens does not fit in "
                f"{self.config.slots} cache slots; raise engine.slots"
            )
        return _Fed(
            ids=ids[:-1], positions=positions[:, :-1], index=index[:-1],
            pending=int(ids[-1]), position=int(positions[0, -1]),
        )  # fmt: skip

    def _chunk(self, part, fed: list["_Fed"], offset: int, size: int) -> steps.Extension:
        """Host arrays of one chunk; rows that are done or not there are marked out of range."""
        total = self.config.extend_rows
        ids = np.zeros((total, size), np.int32)
        positions = np.zeros((3, total, size), np.int32)
        segments = np.zeros((total, size), np.int32)
        index = np.full((total, size), -1, np.int32)
        rows = np.full(total, self.config.rows, np.int32)
        fresh, wake = np.zeros(total, bool), np.zeros(total, bool)
        scalars = np.zeros((4, total), np.int32)  # pending, position, budget, sampled
        keys = np.zeros((total, 2), np.uint32)
        for i, ((resume, new), f) in enumerate(zip(part, fed, strict=True)):
            last = max((f.ids.size - 1) // size, 0) * size
            if offset > last:
                continue
            n = min(size, f.ids.size - offset)
            ids[i, :n] = f.ids[offset : offset + n]
            positions[:, i, :n] = f.positions[:, offset : offset + n]
            segments[i, :n] = 1
            index[i, :n] = f.index[offset : offset + n]
            rows[i], fresh[i], wake[i] = resume.row, new and offset == 0, offset == last
            scalars[:, i] = f.pending, f.position, resume.budget, self._sampled[resume.row]
            keys[i] = self._keys[resume.row]
        return steps.Extension(
            rows=rows, ids=ids, positions=positions, segments=segments, image_index=index,
            fresh=fresh, wake=wake, pending=scalars[0], position=scalars[1], budget=scalars[2],
            keys=jax.random.wrap_key_data(keys, impl="threefry2x32"), sampled=scalars[3],
        )  # fmt: skip

    def _encode(self, pictures: list[Picture]) -> dict[str, int]:
        """Sees to it that the pool holds the pictures' features; returns their first rows."""
        c = self.config
        unique = {p.digest: p for p in pictures}
        bucket = c.patches // self.model.vision.merge_size**2
        missing = [p for d, p in unique.items() if d not in self._pool]
        batches = self._batches(missing)
        if self._pool_used + bucket * len(batches) > c.feature_rows:
            self._pool.clear()
            self._pool_used = 0
            missing = list(unique.values())
            batches = self._batches(missing)
            if bucket * len(batches) > c.feature_rows:
                raise ValueError(
                    f"{len(missing)} pictures at once need {bucket * len(batches)} rows of the "
                    f"feature pool, engine.feature_rows is {c.feature_rows}"
                )
        for batch in batches:
            vision = layout.vision_inputs(
                batch, self.model.vision, patches=c.patches, pictures_bucket=c.pictures,
                frame=c.picture_patches,
            )  # fmt: skip
            features = steps.encode(
                self.graph, self.params, self._state.features, vision, np.int32(self._pool_used)
            )
            self._state = dataclasses.replace(self._state, features=features)
            used = self._pool_used
            for picture in batch:
                self._pool[picture.digest] = used
                used += self._merged(picture)
            self._pool_used = used
        return self._pool


@dataclasses.dataclass(frozen=True)
class _Fed:
    ids: np.ndarray  # [n] tokens that go into the cache
    positions: np.ndarray  # [3, n]
    index: np.ndarray  # [n] rows of the feature pool, -1 for text
    pending: int
    position: int

"""What the engine keeps on the device, and its programs fed with host arrays of fixed shapes.

Knows nothing of who waits for what: it is told which tokens of which trajectories go where.
"""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mmsr_jax.engine import steps
from mmsr_jax.engine.features import FeaturePool
from mmsr_jax.engine.schedule import Copies
from mmsr_jax.engine.sequence import Sequence
from mmsr_jax.model import cache as cache_lib
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model import window as window_lib
from mmsr_jax.parallel.rules import ROLLOUT_RULES, Placement
from mmsr_jax.types import Picture

Part = tuple[Sequence, int, int]  # a trajectory's tokens start .. end - 1


class Device:
    """The pool of pages, the pool of features, and the weights that both belong to."""

    def __init__(self, graph, model, config, eos_ids: tuple[int, ...], pages: int, mesh):
        """`config` is the EngineConfig, `pages` the pages of the pool."""
        self.graph, self.model, self.config = steps.Graph(graph), model, config
        self.eos_ids, self.pages = eos_ids, pages
        self.params = None
        self.table = -(-config.slots // config.page)  # pages of the longest conversation
        here = jax.local_devices()[0] if mesh is None else NamedSharding(mesh, PartitionSpec())
        self.features = FeaturePool(self.graph, model, config, here)
        # Committed like every later pool: otherwise a program's second call compiles it anew.
        kv = qwen.init_pages(model, pages, config.page, mesh)
        place = Placement(mesh, ROLLOUT_RULES)
        self.kv = jax.device_put(kv, here if mesh is None else cache_lib.sharding(place, kv.shape))

        # Rows have arrays of their own on one CPU: see window.py. `seated` are those whose tokens
        # are there, with what had been fed to them.
        self.window = ()
        self.seated: list[tuple[int, int] | None] = [None] * config.rows
        if cache_lib.heads_first(kv):
            window = window_lib.empty(kv, model.text.layers, config.rows, self.table)
            self.window = jax.device_put(window, here)

    def warm_up(self) -> None:
        """Compiles every program, with nothing to do; the state stays as it is."""
        self.features.pass_through(self.params, [], 0)
        self.features.clear()
        self._copy(Copies())
        self._extend([], {})
        self.decode([], 1.0, 1)
        jax.block_until_ready(self.kv)

    def pictures(self, sequence: Sequence, start: int, end: int) -> list[Picture]:
        """The pictures whose features the tokens start .. end - 1 stand for."""
        used = sequence.feature[start:end]
        used = used[used >= 0]
        found, first = [], 0
        if not used.size:
            return found
        for picture in sequence.pictures:
            after = first + self.features.size(picture)
            if first <= used[-1] and used[0] < after:
                found.append(picture)
            first = after
        return found

    def copy(self, copies: Copies) -> int:
        """Copies pages, if there are any to copy; returns how many."""
        count = len(copies.source)
        width = max(self.config.rows, self.config.extend_rows)
        for at in range(0, count, width):
            end = at + width
            self._copy(Copies(copies.source[at:end], copies.target[at:end]))
        copies.source.clear()
        copies.target.clear()
        return count

    def extend(self, parts: list[Part], pictures: list[Picture], soon: list[Picture]) -> None:
        """Feeds `parts`, which show `pictures`; `soon` are pictures of tokens that follow later."""
        self._extend(parts, self.features.ensure(self.params, pictures, soon))

    def _copy(self, copies: Copies) -> None:
        width = max(self.config.rows, self.config.extend_rows)
        source = np.zeros(width, np.int32)
        target = np.full(width, self.pages, np.int32)
        source[: len(copies.source)] = copies.source
        target[: len(copies.target)] = copies.target
        self.kv = steps.copy_pages(self.kv, self.model.text.layers, source, target)

    def _extend(self, parts: list[Part], first_rows: dict[str, int]) -> None:
        """Feeds parts (trajectory, start, end), whose pictures' features lie at `first_rows`."""
        rows, size = self.config.extend_rows, self.config.extend_tokens
        ids = np.zeros((rows, size), np.int32)
        positions = np.zeros((3, rows, size), np.int32)
        segments = np.zeros((rows, size), np.int32)
        feature = np.full((rows, size), -1, np.int32)
        tables = np.zeros((rows, self.table), np.int32)
        lengths = np.zeros(rows, np.int32)
        for i, (sequence, start, end) in enumerate(parts):
            n = end - start
            ids[i, :n] = sequence.ids[start:end]
            positions[:, i, :n] = sequence.positions[:, start:end]
            segments[i, :n] = 1
            own = sequence.feature[start:end]
            at = 0
            for picture in sequence.pictures:
                after = at + self.features.size(picture)
                mine = (own >= at) & (own < after)
                if mine.any():
                    feature[i, :n][mine] = own[mine] - at + first_rows[picture.digest]
                at = after
            tables[i, : len(sequence.pages)] = sequence.pages
            lengths[i] = start
        piece = steps.Extension(ids, positions, segments, feature, tables, lengths)
        self.kv = steps.extend(self.graph, self.params, self.kv, self.features.array, piece)

    def decode(self, running: list[Sequence], temperature: float, patience: int) -> steps.Sampled:
        """Lets these decode (see `steps.decode`); returns host arrays, entry i for `running[i]`."""
        count = self.config.rows
        scalars = np.zeros((5, count), np.int32)
        keys = np.zeros((count, 2), np.uint32)
        tables = np.zeros((count, self.table), np.int32)
        seats, fresh = self._seat(running)
        for row, s in zip(seats, running, strict=True):
            last = s.known - 1
            scalars[:, row] = s.ids[last], s.positions[0, last], s.cached, s.left, s.sampled
            keys[row] = s.key
            tables[row, : len(s.pages)] = s.pages
        rows = steps.Rows(*scalars, keys=keys, tables=tables, fresh=fresh)
        self.kv, self.window, sampled = steps.decode(
            self.graph, self.params, self.kv, self.window, rows, np.float32(temperature),
            np.int32(patience), self.eos_ids, self.config.decode_steps,
        )  # fmt: skip
        for row, s in zip(seats, running, strict=True):  # now that they sit there
            self.seated[row] = s.number, s.fed
        host = jax.device_get(sampled)  # the one copy of a look to the host
        by_entry = (x[seats] for x in (host.ids, host.logprobs, host.counts, host.active))
        return steps.Sampled(*by_entry, host.steps)

    def _seat(self, running: list[Sequence]) -> tuple[list[int], np.ndarray]:
        """A row for each, and which rows the window does not hold yet ([B] bool).

        Who was in a row before, and has only sampled since, keeps it.
        """
        held = {who: row for row, who in enumerate(self.seated) if who}
        seats = [held.get((s.number, s.fed)) for s in running]
        free = iter(sorted(set(range(self.config.rows)) - set(seats)))
        fresh = np.zeros(self.config.rows, bool)
        for i, row in enumerate(seats):
            if row is None:
                seats[i] = next(free)
                fresh[seats[i]] = True
                self.seated[seats[i]] = None  # until it has been filled
        return seats, fresh

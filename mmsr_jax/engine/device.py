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
        """Lets these decode (see `steps.decode`); returns host arrays, row i for `running[i]`."""
        count = self.config.rows
        scalars = np.zeros((5, count), np.int32)
        keys = np.zeros((count, 2), np.uint32)
        tables = np.zeros((count, self.table), np.int32)
        for i, s in enumerate(running):
            last = s.known - 1
            scalars[:, i] = s.ids[last], s.positions[0, last], s.cached, s.left, s.sampled
            keys[i] = s.key
            tables[i, : len(s.pages)] = s.pages
        rows = steps.Rows(*scalars, keys=keys, tables=tables)
        self.kv, sampled = steps.decode(
            self.graph, self.params, self.kv, rows, np.float32(temperature), np.int32(patience),
            self.eos_ids, self.config.decode_steps,
        )  # fmt: skip
        return jax.device_get(sampled)  # the one copy of a look to the host

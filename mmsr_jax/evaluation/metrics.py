"""From scored trajectories to the numbers of a table.

All means are taken over entities first, then over the world: a question's pictures and samples
are no independent evidence, its entity is. Standard errors are those of the mean over entities.
"""

import collections
import dataclasses

import numpy as np

from mmsr_jax.rewards.score import Score
from mmsr_jax.types import Trajectory


@dataclasses.dataclass(frozen=True)
class Scored:
    """A trajectory with its reward."""

    trajectory: Trajectory
    score: Score

    @property
    def parts(self) -> dict:
        """The reward's parts by name, for people to read."""
        return dataclasses.asdict(self.score)

    @property
    def searched(self) -> bool:
        return self.score.searches > 0


MEASURES = {
    "accuracy": lambda s: float(s.score.correct),
    "format": lambda s: float(s.score.format),
    "search_ratio": lambda s: float(s.searched),
    "reward": lambda s: float(s.score.total),
}


def summarise(scored: list[Scored], categories: tuple[str, ...]) -> dict[str, float]:
    """Flat numbers over all `categories` together and over each of them.

    Returns:
      `accuracy`, `format`, `search_ratio`, `reward`, each with `_se` (standard error by entity),
      and the same under `CATEGORY/`; further `CATEGORY/accuracy_direct` and
      `CATEGORY/accuracy_searched` (given no search, given one, each over trajectories and not over
      entities; absent where there was none), and `CATEGORY/count` (trajectories).
    """
    out = _means([s for s in scored if s.trajectory.example.category in categories], "")
    for category in categories:
        part = [s for s in scored if s.trajectory.example.category == category]
        out |= _means(part, f"{category}/")
        for name, given in (("direct", False), ("searched", True)):
            chosen = [s for s in part if s.searched == given]
            if chosen:
                value = np.mean([s.score.correct for s in chosen])
                out[f"{category}/accuracy_{name}"] = float(value)
    return out


def training(scored: list[Scored]) -> dict[str, float]:
    """What a training step logs of its trajectories, by the names of the run's metrics."""

    def mean(f):
        return float(np.mean([f(s) for s in scored]))

    def used(tool):
        return lambda s: any(t.call and t.call.tool == tool for t in s.trajectory.turns)

    errors = [bool(t.result and t.result.error) for s in scored for t in s.trajectory.turns]
    out = {
        "reward/mean": mean(lambda s: s.score.total),
        "reward/accuracy": mean(lambda s: s.score.correct),
        "reward/format": mean(lambda s: s.score.format),
        "search/ratio": mean(lambda s: s.searched),
        "search/image_ratio": mean(used("image_search")),
        "search/text_ratio": mean(used("text_search")),
        "length/tokens": mean(lambda s: len(s.trajectory.tokens)),
        "tools/errors": float(sum(errors)),
    }
    for category in sorted({s.trajectory.example.category for s in scored}):
        part = [s for s in scored if s.trajectory.example.category == category]
        out[f"search/ratio/{category}"] = float(np.mean([s.searched for s in part]))
        out[f"reward/mean/{category}"] = float(np.mean([s.score.total for s in part]))
    endings = [str(s.trajectory.ending) for s in scored]
    return out | {
        f"ending/{name}": endings.count(name) / len(endings) for name in sorted(set(endings))
    }


def by_entity(scored: list[Scored], measure: str) -> dict[str, float]:
    """Mean of a measure for each entity: the unit for paired comparisons."""
    values = collections.defaultdict(list)
    for s in scored:
        values[s.trajectory.example.entity].append(MEASURES[measure](s))
    return {entity: float(np.mean(v)) for entity, v in values.items()}


def paired(a: list[Scored], b: list[Scored], measure: str) -> tuple[float, float]:
    """Mean of a - b over the entities of both, and its standard error."""
    left, right = by_entity(a, measure), by_entity(b, measure)
    shared = sorted(left.keys() & right.keys())
    if not shared:
        raise ValueError("the two evaluations share no entity")
    gaps = np.array([left[e] - right[e] for e in shared])
    return float(gaps.mean()), _error(gaps)


def _means(scored: list[Scored], prefix: str) -> dict[str, float]:
    out: dict[str, float] = {f"{prefix}count": float(len(scored))}
    for measure in MEASURES if scored else ():
        values = np.array(list(by_entity(scored, measure).values()))
        out[f"{prefix}{measure}"] = float(values.mean())
        out[f"{prefix}{measure}_se"] = _error(values)
    return out


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else 0.0

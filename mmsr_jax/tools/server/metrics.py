"""What a server counts, in Prometheus' text format (version 0.0.4)."""

import collections
import threading
from collections.abc import Mapping

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters of requests, queries and errors, and a histogram of seconds, by path.

    Only paths and errors that the server knows by name become labels: nobody can fill the memory
    by asking for ever new ones.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._errors: collections.Counter[tuple[str, str]] = collections.Counter()
        self._queries: collections.Counter[str] = collections.Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: collections.Counter[str] = collections.Counter()
        self.in_flight = 0  # written by the event loop's thread alone

    def done(self, path: str, status: int, seconds: float, error: str = "") -> None:
        """One request has ended; `error` is the kind of what went wrong."""
        with self._lock:
            self._requests[path, status] += 1
            if error:
                self._errors[path, error] += 1
            buckets = self._buckets.setdefault(path, [0] * (len(SECONDS) + 1))
            buckets[sum(seconds > limit for limit in SECONDS)] += 1
            self._seconds[path] += seconds

    def asked(self, path: str, queries: int) -> None:
        """So many searches were asked for."""
        with self._lock:
            self._queries[path] += queries

    def text(self, gauges: Mapping[str, float]) -> str:
        """The page that Prometheus reads.

        Args:
            gauges: further values by name, such as the sizes of the index.
        """
        with self._lock:
            parts = [
                _family("requests_total", "counter", "Requests answered.", [
                    (f'{{path="{path}",status="{status}"}}', count)
                    for (path, status), count in sorted(self._requests.items())
                ]),
                _family("errors_total", "counter", "Requests refused or failed, by kind.", [
                    (f'{{path="{path}",kind="{kind}"}}', count)
                    for (path, kind), count in sorted(self._errors.items())
                ]),
                _family("queries_total", "counter", "Searches; a request may hold many.", [
                    (f'{{path="{path}"}}', count)
                    for path, count in sorted(self._queries.items())
                ]),
                self._histogram(),
            ]  # fmt: skip
        parts.append(
            _family("in_flight", "gauge", "Requests being answered.", [("", self.in_flight)])
        )
        parts += [_family(name, "gauge", name, [("", value)]) for name, value in gauges.items()]
        return "".join(parts)

    def _histogram(self) -> str:
        name = "mmsr_search_request_seconds"
        lines = [f"# HELP {name} From the first byte to the answer.", f"# TYPE {name} histogram"]
        for path, counts in sorted(self._buckets.items()):
            total = 0
            for limit, count in zip((*SECONDS, "+Inf"), counts, strict=True):
                total += count
                lines.append(f'{name}_bucket{{path="{path}",le="{limit}"}} {total}')
            lines.append(f'{name}_sum{{path="{path}"}} {self._seconds[path]:.6f}')
            lines.append(f'{name}_count{{path="{path}"}} {total}')
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, said: str, samples: list[tuple[str, float]]) -> str:
    name = f"mmsr_search_{name}"
    lines = [f"# HELP {name} {said}", f"# TYPE {name} {kind}"]
    lines += [f"{name}{labels} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"

"""What one provider may take: requests a second, requests at once, failures in a row."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """The manners towards one provider."""

    rate: float = 10.0  # requests a second, on average
    burst: int = 10  # requests that may go out at once after a quiet time
    concurrency: int = 16  # requests under way at the same time
    breaker_failures: int = 20  # failures in a row that open the circuit
    breaker_seconds: float = 15.0  # how long it stays open before one request may probe

    def __post_init__(self):
        for name in ("rate", "breaker_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("burst", "concurrency", "breaker_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

"""Serves an application until it is told to stop."""

import errno
import socket
from collections.abc import Callable

import uvicorn

GRACE = 10  # seconds that requests under way may take after SIGTERM or Ctrl-C
BACKLOG = 2048
CONNECTIONS = 4096  # open at the same time; more get a plain 503


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one.

    Raises:
        ValueError: an address that is taken, forbidden, or not this machine's.
    """
    if not 0 <= port <= 65_535:
        raise ValueError(f"port {port} is not in 0..65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        cure = "; choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}{cure}") from error
    return listening


def serve(app, listening: socket.socket, ready: Callable[[str], None] = lambda url: None) -> None:
    """Answers until SIGTERM or SIGINT; then takes no more, and ends what is under way.

    Args:
        ready: called with the address as soon as requests are answered.
    """
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=30,
        backlog=BACKLOG,
        limit_concurrency=CONNECTIONS,
    )
    server = _Announcing(config, lambda: ready(url))
    server.run(sockets=[listening])


class _Announcing(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

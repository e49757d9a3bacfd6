"""A server on a real loopback socket that does whatever a test wants, also what no server should.

A handler is `async def handler(head: str, reader, writer)`; what it writes goes out as it is.
"""

import asyncio
import contextlib
import socket
import struct


class FaultServer:
    """`async with FaultServer(handler) as server`: `server.url` is its address."""

    def __init__(self, handler, context=None):
        self.handler, self.context = handler, context
        self.heads = []  # the head of every request that came
        self.bodies = []
        self.tasks = set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.context)
        self.port = self.server.sockets[0].getsockname()[1]
        scheme = "https" if self.context else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *exc_info):
        self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def serve(self, reader, writer):
        self.tasks.add(task := asyncio.current_task())
        task.add_done_callback(self.tasks.discard)
        ended = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ended):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = header(head, "content-length")
                self.bodies.append(await reader.readexactly(int(length)) if length else b"")
                self.heads.append(head)
                await self.handler(head, reader, writer)
                await writer.drain()
                if writer.is_closing():
                    break
        writer.close()


def header(head, name):
    """A header's value in a request's head, or None."""
    for line in head.split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name:
            return value.strip()
    return None


def path(head):
    return head.split(" ")[1]


def response(status=200, body=b"", content_type="application/json", **headers):
    """The bytes of a whole response."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}"]
    lines += [f"Content-Type: {content_type}"] if content_type else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def always(*args, **kwargs):
    """A handler that gives one response to everything."""

    async def handler(head, reader, writer):
        writer.write(response(*args, **kwargs))

    return handler


def reset(writer):
    """Ends a connection with RST instead of FIN."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()

"""The flags world's indices over HTTP, with the interface of `mmsr search serve`.

    python tests/tools/flags_server.py

prints its address. POST /retrieve, POST /image; GET /stats counts calls by request.
"""

import asyncio
import base64
import collections
import hashlib
import json

from fault_server import FaultServer, path, response

from mmsr_jax.data.flags.search import image_index, text_index
from mmsr_jax.data.flags.world import World
from mmsr_jax.tools.base import ToolError


async def serve() -> None:
    world = World()
    texts, images = text_index(world), image_index(world)
    asked: collections.Counter = collections.Counter()

    def answer(where: str, content: dict) -> dict:
        if where == "/retrieve":
            return {"result": [
                [{"document": {"title": p.title, "link": p.link, "text": p.text,
                               "contents": f'"{p.title}"\n{p.text}'}, "score": 1.0}
                 for p in texts.search(query, content["topk"])]
                for query in content["queries"]
            ]}  # fmt: skip
        found = images.search(base64.b64decode(content["image"]), content["topk"])
        return {"result": [
            {"title": e.title, "link": e.link, "score": 1.0,
             "thumbnail": base64.b64encode(e.thumbnail).decode()}
            for e in found
        ]}  # fmt: skip

    async def handler(head, reader, writer):
        body, where = server.bodies.pop(), path(head)
        if where == "/stats":
            writer.write(response(200, json.dumps(asked).encode()))
            return
        asked[f"{where} {hashlib.sha256(body).hexdigest()}"] += 1
        try:
            writer.write(response(200, json.dumps(answer(where, json.loads(body))).encode()))
        except ToolError as error:
            writer.write(response(422, json.dumps({"error": str(error)}).encode()))

    server = FaultServer(handler)
    async with server:
        print(server.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())

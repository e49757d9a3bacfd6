"""`mmsr search store`: what a store of search calls holds; its way to parquet and back."""

import asyncio
import dataclasses
import json

from mmsr_jax.cli.endings import UsageError

EXAMPLE = "mmsr search store calls.db --export calls.parquet"


def add(tools) -> None:
    """Adds the command to those of `mmsr search`."""
    store = tools.add_parser(
        "store",
        prog="mmsr search store",
        description="Shows what a store holds: calls, uses, money, size.",
        example=EXAMPLE,
    )
    store.add_argument("path", metavar="PATH", help="the store's file")
    store.add_argument("--json", action="store_true", help="one JSON object")
    store.add_argument("--check", action="store_true", help="read everything, look for damage")
    store.add_argument("--export", metavar="FILE", help="write all records to a parquet file")
    store.add_argument(
        "--import", metavar="FILE", dest="read", help="take the records of such a file in"
    )
    store.add_argument(
        "--fvqa", metavar="PICKLE", help="take FVQA's cached image searches in (*_cache.pkl)"
    )
    store.add_argument(
        "--questions", metavar="PARQUET", nargs="+", default=[], help="FVQA's questions, for --fvqa"
    )
    store.add_argument(
        "--fetch", action="store_true", help="with --fvqa: fetch thumbnails that are URLs"
    )


def run(given) -> None:
    from mmsr_jax.tools.store import Store

    if bool(given.fvqa) != bool(given.questions):
        raise UsageError("--fvqa and --questions belong together: the cache, and whose it is")
    makes = bool(given.read or given.fvqa)
    store = Store(given.path, write=makes)
    try:
        done = _work(given, store)
        summary = store.summary()
    finally:
        store.close()
    if given.json:
        print(json.dumps(summary | done))
    else:
        _print(given.path, summary, done)
    if done.get("damage"):
        raise UsageError(f"{given.path} is damaged: {done['damage'][0]}")


def _work(given, store) -> dict:
    done: dict = {}
    if given.read or given.export:
        from mmsr_jax.tools import store_parquet
    if given.read:
        taken, left = store_parquet.read(store, given.read)
        done |= {"imported": taken, "already_there": left}
    if given.fvqa:
        done["fvqa"] = dataclasses.asdict(asyncio.run(_fvqa(given, store)))
    if given.check:
        done["damage"] = store.check()
    if given.export:
        done["exported"] = store_parquet.write(store, given.export)
    return done


async def _fvqa(given, store):
    from mmsr_jax.tools import fvqa_cache
    from mmsr_jax.tools.assembly import WebConfig, thumbnails
    from mmsr_jax.tools.http import Http
    from mmsr_jax.tools.pictures import reencode

    cache = fvqa_cache.load(given.fvqa)
    digests = list(fvqa_cache.question_digests(given.questions))
    web = WebConfig()
    async with Http(web.http) as http:
        get = thumbnails(http, web.pictures)

        async def fetch(url: str) -> bytes:
            data = await get(url, web.deadline)
            return await asyncio.to_thread(reencode, data, web.pictures)

        return await fvqa_cache.convert(cache, digests, store, fetch if given.fetch else None)


def _print(path: str, summary: dict, done: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for name in ("kind", "provider", "records", "uses", "paid $", "saved $", "MB"):
        table.add_column(name, justify="left" if name in ("kind", "provider") else "right")
    for kind in summary["kinds"]:
        table.add_row(
            kind["kind"], kind["provider"], str(kind["records"]), str(kind["hits"]),
            f"{kind['paid']:.4f}", f"{kind['saved']:.4f}", f"{kind['bytes'] / 1e6:.2f}",
        )  # fmt: skip
    Console().print(table)
    asked = summary["hits"] + summary["misses"]
    share = f" ({100 * summary['hits'] / asked:.1f} %)" if asked else ""
    print(
        f"{path}: {summary['records']} records, {summary['pictures']} pictures, "
        f"{summary['file_bytes'] / 1e6:.2f} MB on disk, {summary['evicted']} evicted"
    )
    print(f"{summary['hits']} hits{share}, {summary['misses']} misses, ${summary['paid']:.4f} paid")
    for name, value in done.items():
        if name == "damage":
            print("no damage" if not value else "\n".join(value))
        elif isinstance(value, dict):
            print(f"{name}: " + ", ".join(f"{n} {k}" for k, n in value.items()))
        else:
            print(f"{name.replace('_', ' ')}: {value}")

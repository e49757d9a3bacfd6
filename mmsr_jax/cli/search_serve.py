"""`mmsr search serve`: an index over HTTP."""

import pathlib

from mmsr_jax.cli.endings import UsageError

EXAMPLE = "mmsr search serve indices/articles --port 8000"
FLAGS = "flags"


def add(commands) -> None:
    """Adds the parser of `serve` to those of `mmsr search`."""
    made = commands.add_parser(
        "serve",
        prog="mmsr search serve",
        description="Answers POST /retrieve (as Search-R1's retrieval server does), POST /image, "
        "GET /health and GET /metrics, until Ctrl-C or SIGTERM. There is no login: listen "
        "beyond this machine only in a network that you trust.",
        example=EXAMPLE,
    )
    made.add_argument("index", metavar="INDEX", help=f"an index folder, or {FLAGS}: that world's")
    made.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    made.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    made.add_argument("--topk", type=int, default=3, help="results where a request has no topk (3)")
    made.add_argument("--threads", type=int, default=0, help="that search (default: 2 x cores)")
    made.add_argument("--deadline", type=float, default=30.0, help="seconds of a request (30)")
    made.add_argument("--weights", default="", help="of the pictures' model, if it has moved")


def run(given) -> None:
    """Serves until it is stopped."""
    try:
        from mmsr_jax.tools.server import app, run
    except ImportError as error:
        raise UsageError(
            f'the server needs the extra "serve": pip install "mmsr-jax[serve]" ({error})'
        ) from error
    config = app.ServerConfig(
        threads=given.threads,
        deadline=given.deadline,
        limits=app.Limits(default_topk=given.topk),
    )
    listening = run.listen(given.host, given.port)
    try:
        text, pictures, close = _open(given.index, given.weights)
        run.serve(
            app.application(text, pictures, config, close),
            listening,
            lambda url: print(f"serving {given.index} on {url}", flush=True),
        )
    finally:
        listening.close()


def _open(name: str, weights: str):
    """The text index, the picture index, and what closes them."""
    if name == FLAGS and not pathlib.Path(name).exists():
        from mmsr_jax.data.flags.search import image_index, text_index
        from mmsr_jax.data.flags.world import World

        world = World()
        return text_index(world), image_index(world), lambda: None
    from mmsr_jax.embed.folder import open_folder
    from mmsr_jax.tools.index.open import FolderConfig

    index = open_folder(FolderConfig(name, weights), "--weights")
    return index.text, index.pictures, index.close

"""The world's articles and flags as files: what `mmsr search index` makes an index of."""

import json
import pathlib

from mmsr_jax.data.flags import facts
from mmsr_jax.data.flags.world import World

ARTICLES, PICTURES = "articles.jsonl", "pictures"
# Of no kind that is indexed, hence without the .md that they have among the assets.
NOTICES = ("ATTRIBUTION", "LICENSE-facts-ODbL-1.0", "LICENSE-flags-public-domain")


def write_corpus(world: World, folder: pathlib.Path | str) -> tuple[int, int]:
    """Writes what the embedded search engine searches, and where it comes from.

    `articles.jsonl` has a row for every sentence (`id`, `title`, `link`, `text`), since a sentence
    is what a text search of this world returns; rows with one link are one article. `pictures/`
    has each distinct flag as CODE.png, and CODE.json with its title and link.

    Returns: how many sentences, and how many pictures.

    Raises:
      ValueError: there is something in the folder already.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: choose another folder, or remove it")
    (folder / PICTURES).mkdir(parents=True)
    rows = [
        {"id": f"{article.link}#{n}", "title": article.title, "link": article.link, "text": text}
        for article in world.articles()
        for n, text in enumerate(article.sentences, 1)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / ARTICLES).write_text(lines, encoding="utf-8")
    flags = world.flags()
    for code, flag in flags.items():
        beside = {"title": world.countries[code].name, "link": f"flags:{code}"}
        (folder / PICTURES / f"{code}.png").write_bytes(flag)
        text = json.dumps(beside, ensure_ascii=False) + "\n"
        (folder / PICTURES / f"{code}.json").write_text(text, encoding="utf-8")
    for name in NOTICES:
        (folder / name).write_bytes((facts.ASSETS / f"{name}.md").read_bytes())
    return len(rows), len(flags)

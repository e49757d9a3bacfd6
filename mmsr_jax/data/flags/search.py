"""The search engine of the flags world: real tools over its articles and flags."""

from mmsr_jax.data.flags.world import World
from mmsr_jax.tools.base import Tool
from mmsr_jax.tools.image_search import LocalImageSearch
from mmsr_jax.tools.local import LocalImageIndex, LocalTextIndex, Passage, PictureEntry
from mmsr_jax.tools.text_search import LocalTextSearch


def text_index(world: World) -> LocalTextIndex:
    """Every sentence of every article is a passage."""
    return LocalTextIndex(
        Passage(article.title, article.link, sentence)
        for article in world.articles()
        for sentence in article.sentences
    )


def image_index(world: World) -> LocalImageIndex:
    """Every distinct flag; an entry's title is the country's name."""
    return LocalImageIndex(
        (flag, PictureEntry(world.countries[code].name, f"flags:{code}", world.thumbnail(code)))
        for code, flag in world.flags().items()
    )


def flags_tools(world: World, image_results: int = 3, text_results: int = 3) -> dict[str, Tool]:
    """`image_search` and `text_search`, as `Toolbox` takes them."""
    return {
        LocalImageSearch.name: LocalImageSearch(image_index(world), image_results),
        LocalTextSearch.name: LocalTextSearch(text_index(world), text_results),
    }

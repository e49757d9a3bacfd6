"""Does an episode keep to the form? Reason first, one action last, searches in order."""

from collections.abc import Sequence

from mmsr_jax.protocol import (
    ANSWER,
    ANSWER_END,
    IMAGE_SEARCH,
    REASON,
    REASON_END,
    TEXT_SEARCH,
    TEXT_SEARCH_END,
    Answer,
    ImageSearch,
    TextSearch,
    parse,
)

_TAGS = (REASON, REASON_END, ANSWER, ANSWER_END, IMAGE_SEARCH, TEXT_SEARCH, TEXT_SEARCH_END)
_ACTION_TAGS = {
    Answer: (ANSWER, ANSWER_END),
    ImageSearch: (IMAGE_SEARCH,),
    TextSearch: (TEXT_SEARCH, TEXT_SEARCH_END),
}


def well_formed(responses: Sequence[str], image_searches: int = 1, text_searches: int = 1) -> bool:
    """Whether the responses of one episode keep to the form.

    Each response starts with one <reason>...</reason>, ends with its one action as
    `mmsr_jax.protocol.parse` reads it, and holds no other action tag; white space around it does
    not matter and free text between the two is allowed. In order there may be up to
    `image_searches` picture searches, then up to `text_searches` text searches, then the answer.
    The defaults are MMSearch-R1's rule: only answer; picture, answer; text, answer; and picture,
    text, answer are well formed, however many rounds the episode may have.
    """
    actions = [_action(response) for response in responses]
    if not actions or actions[-1] is not Answer or None in actions:
        return False
    searches = actions[:-1]
    images = searches.count(ImageSearch)
    texts = searches.count(TextSearch)
    in_order = searches == [ImageSearch] * images + [TextSearch] * texts
    return in_order and images <= image_searches and texts <= text_searches


def _action(response: str) -> type | None:
    """Kind of action of a response in good form, None for one in bad form."""
    text = response.strip()
    kind = type(parse(text))
    if kind not in _ACTION_TAGS:
        return None
    wanted = (REASON, REASON_END, *_ACTION_TAGS[kind])
    if any(text.count(tag) != (tag in wanted) for tag in _TAGS):
        return None
    reasoned = text.startswith(REASON) and text.find(REASON_END) < text.find(wanted[2])
    return kind if reasoned else None

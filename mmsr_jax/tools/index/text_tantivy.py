"""Text on disk by tantivy (extra `index`): many times faster than FTS5 on large indices."""

import pathlib
from collections.abc import Iterable

from mmsr_jax.tools.index.text import Scored, best_by_link, words
from mmsr_jax.tools.local import TITLE_WEIGHT, Passage

FOLDER = "text.tantivy"
ANALYZER = "folded"  # small letters without accents, as FTS5's unicode61 has them
HEAP_BYTES = 256_000_000  # what the writer holds before it writes a segment


def _tantivy():
    try:
        import tantivy
    except ImportError as error:
        raise ValueError(
            'text by tantivy needs the extra "index": pip install "mmsr-jax[index]" (or --text fts)'
        ) from error
    return tantivy


def _schema(tantivy):
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("title", stored=True, tokenizer_name=ANALYZER)
    builder.add_text_field("link", stored=True, tokenizer_name="raw", index_option="basic")
    builder.add_text_field("text", stored=True, tokenizer_name=ANALYZER)
    return builder.build()


def _analyzer(tantivy):
    filters = tantivy.Filter
    made = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    made = made.filter(filters.remove_long(100)).filter(filters.lowercase())
    return made.filter(filters.ascii_fold()).build()


class TantivyWriter:
    """Writes `FOLDER` into a folder."""

    def __init__(self, folder: pathlib.Path):
        self._tantivy = _tantivy()
        path = folder / FOLDER
        path.mkdir()
        index = self._tantivy.Index(_schema(self._tantivy), path=str(path))
        index.register_tokenizer(ANALYZER, _analyzer(self._tantivy))
        self._writer = index.writer(HEAP_BYTES)

    def add(self, passages: Iterable[Passage]) -> None:
        for title, link, text in passages:
            self._writer.add_document(self._tantivy.Document(title=title, link=link, text=text))

    def finish(self) -> None:
        self._writer.commit()
        self._writer.wait_merging_threads()


class TantivyIndex:
    """BM25 over title and passage (tantivy's own k1 and b), a title's words counting more."""

    def __init__(self, folder: pathlib.Path):
        self._tantivy = _tantivy()
        path = folder / FOLDER
        try:
            index = self._tantivy.Index.open(str(path))
        except Exception as error:  # tantivy's errors are plain ValueError, OSError, ...
            raise ValueError(f"{path} is no text index: {error}") from error
        self._analyzer = _analyzer(self._tantivy)
        index.register_tokenizer(ANALYZER, self._analyzer)
        self._schema = index.schema
        self._searcher = index.searcher()

    def __len__(self) -> int:
        return self._searcher.num_docs

    def scored(self, query: str, topk: int) -> Scored:
        tantivy, clauses = self._tantivy, []
        for term in dict.fromkeys(self._analyzer.analyze(" ".join(words(query)))):
            # Built from terms, not parsed: nothing in a query can be an operator.
            title = tantivy.Query.term_query(self._schema, "title", term, "freq")
            text = tantivy.Query.term_query(self._schema, "text", term, "freq")
            clauses += [tantivy.Query.boost_query(title, TITLE_WEIGHT), text]
        if not clauses:
            return []
        either = tantivy.Query.boolean_query([(tantivy.Occur.Should, c) for c in clauses])
        return best_by_link(lambda limit: self._best(either, limit), topk)

    def search(self, query: str, topk: int) -> list[Passage]:
        return [passage for passage, _ in self.scored(query, topk)]

    def close(self) -> None:
        self._searcher = None

    def _best(self, query, limit: int) -> Scored:
        found = self._searcher.search(query, limit, count=False)
        # Documents come one by one: stored fields are compressed in blocks.
        documents = ((self._searcher.doc(address), score) for score, address in found.hits)
        return [
            (Passage(*(document.get_first(name) or "" for name in Passage._fields)), score)
            for document, score in documents
        ]

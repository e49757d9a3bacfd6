"""Which page of the pool belongs to whom: a free list with counts of owners."""


class PagePool:
    """Pages 0 .. total-1. A page may have several owners; it is free when it has none.

    Whoever writes to a page must own it alone: `shared` says whether to copy it first.
    """

    def __init__(self, total: int):
        self.total = total
        self._owners = [0] * total
        # Taken from the end: lower numbers first, for people who read a dump.
        self._free = list(range(total))[::-1]

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A page of one's own.

        Raises:
          IndexError: none is free; the caller looks at `free` first.
        """
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def share(self, pages: list[int]) -> list[int]:
        """One more owner for each of `pages`."""
        for page in pages:
            if not self._owners[page]:
                raise ValueError(f"page {page} belongs to nobody and cannot be shared")
            self._owners[page] += 1
        return list(pages)

    def owners(self, page: int) -> int:
        return self._owners[page]

    def shared(self, page: int) -> bool:
        return self._owners[page] > 1

    def give_back(self, pages: list[int]) -> None:
        """One owner less for each of `pages`."""
        for page in pages:
            if not self._owners[page]:
                raise ValueError(f"page {page} is given back, but belongs to nobody")
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)

    def gain(self, pages: list[int]) -> int:
        """How many of `pages` would become free if one owner gave them back."""
        return sum(self._owners[page] == 1 for page in pages)

"""Cache pages in integers: who holds which, and which can be found again by the tokens they hold.

A page is `page_size` slots; slot = page * page_size + offset. Latents depend on every token before them, so a full page
is a node of a chain: its key is the node before it, the request's salt and its own tokens. Nodes are numbered once and
never again, and the dict compares keys byte by byte: no hash is ever trusted with an answer.

A drafting module writes, at position i, latents of token i + 1 too, so a page depends on the first token after it.
With `lookahead` 1 a key holds that token as well, and a page is found only by requests that go on with it. A prefix
loses its last page to that where it ends with the page, once in page_size times; drafts lose nothing.

Pages without a holder wait in `free`, the next to be handed out first: those that nobody can find, then the findable
ones, least recently used first. A holder gives its last page back first, so a chain loses its end before its beginning.
"""

from array import array
from collections import OrderedDict

TRASH = 0  # never handed out: padding writes go to its first slot
Key = tuple[int, str, bytes]


class PagePool:
    """Pages 1..num_pages. `refs[page]` counts holders; a page with more than one, or a findable one, is read only."""

    def __init__(self, num_pages: int, page_size: int, lookahead: int = 0):
        self.num_pages, self.page_size, self.lookahead = num_pages, page_size, lookahead
        self.free = OrderedDict.fromkeys(range(TRASH + 1, num_pages + 1))
        self.refs = [0] * (num_pages + 1)
        self.given = 0  # pages that holders have given back, ever
        self.root = 0  # the node before every first page
        self._nodes: dict[Key, tuple[int, int]] = {}  # key -> page and node
        self._keys: list[Key | None] = [None] * (num_pages + 1)  # of findable pages
        self._next_node = 1

    @property
    def findable(self) -> list[int]:
        """Pages that `find` may return, held or free."""
        return [page for page, _ in self._nodes.values()]

    def needed(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` free pages, with one holder each. The caller checks that there are as many."""
        if count > len(self.free):
            raise RuntimeError(f"{count} pages wanted, {len(self.free)} free")
        pages = [self.free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self.refs[page] = 1
            if (key := self._keys[page]) is not None:
                self._keys[page] = None
                del self._nodes[key]
        return pages

    def hold(self, pages: list[int]) -> None:
        """One more holder for each of the pages, which `find` has just returned."""
        for page in pages:
            if self.refs[page] == 0:
                del self.free[page]
            self.refs[page] += 1

    def give(self, pages: list[int]) -> None:
        """One holder less. Empties the holder's list, so that it cannot give twice."""
        for page in reversed(pages):
            if self.refs[page] < 1:
                raise RuntimeError(f"page {page} is given back, but nobody holds it")
            self.refs[page] -= 1
            if self.refs[page] == 0:
                self.free[page] = None
                if self._keys[page] is None:
                    self.free.move_to_end(page, last=False)
        self.given += len(pages)
        pages.clear()

    def find(self, ids: list[int], salt: str, most: int) -> tuple[list[int], int]:
        """Pages that hold the longest known beginning of `ids`, up to `most` tokens, and its node. One token at least
        is left over, because somebody must compute the logits of the next. Holds nothing yet."""
        pages: list[int] = []
        node = self.root
        for index in range(min(len(ids) - 1, most) // self.page_size):
            entry = self._nodes.get(self._key(node, salt, ids, index))
            if entry is None:
                break
            pages.append(entry[0])
            node = entry[1]
        return pages, node

    def publish(self, node: int, salt: str, ids: list[int], index: int, page: int) -> int:
        """Make `page` findable: it holds page number `index` of `ids`, computed to the end, and `node` is that of the
        page before it. Returns its node; that of the same page in another copy, if one is known."""
        key = self._key(node, salt, ids, index)
        entry = self._nodes.get(key)
        if entry is None:
            entry = self._nodes[key] = (page, self._next_node)
            self._keys[page] = key
            self._next_node += 1
        return entry[1]

    def reset(self) -> None:
        """The weights have changed: no page that was begun before will be found. Chains of running requests may grow,
        but `find` starts from the new root and never meets them."""
        self._nodes.clear()
        self._keys = [None] * (self.num_pages + 1)
        self.root = self._next_node
        self._next_node += 1

    def _key(self, node: int, salt: str, ids: list[int], index: int) -> Key:
        begin = index * self.page_size
        return node, salt, array("i", ids[begin : begin + self.page_size + self.lookahead]).tobytes()

"""The free list of cache pages, in integers. A page is `page_size` slots; slot = page * page_size + offset."""

TRASH = 0  # never handed out: padding writes go to its first slot


class PagePool:
    """Pages 1..num_pages. Handing out the page returned last keeps memory warm and runs repeatable."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self.free = list(range(num_pages, TRASH, -1))

    def needed(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` free pages. The caller checks that there are as many."""
        if count > len(self.free):
            raise RuntimeError(f"{count} pages wanted, {len(self.free)} free")
        return [self.free.pop() for _ in range(count)]

    def give(self, pages: list[int]) -> None:
        """Return the pages and empty the owner's list, so that they cannot be returned twice."""
        self.free.extend(reversed(pages))
        pages.clear()

"""The pages of a cache: who uses which, and which hold a beginning that another text may share.

A page holds the keys and values of `size` successive tokens. A full page is known by a hash of everything up to its end (and of
a salt, such as the tenant), so that a later text with the same beginning takes the page instead of computing it. Pages that
nobody uses stay until room is needed, the longest unused goes first.
"""

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    """Changes with every call. Every page is free, idle (kept for whoever shares its beginning) or used, and nothing else. Some that are
    not used may be promised to a search over beams (beams.py): `take` leaves as many."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.free = list(range(count))  # a heap: the lowest page first, so that used ones stay neighbours
        self.users = [0] * count
        self.promised = 0
        self.key_of: dict[int, bytes] = {}
        self.page_of: dict[bytes, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` could give."""
        return len(self.free) + len(self.idle) - self.promised

    @property
    def usage(self) -> float:
        """The share of the pages that are used or promised now."""
        return 1 - self.available / self.count

    def take(self, count: int) -> list[int] | None:
        """`count` pages for one user; None, and nothing changes, where there are not so many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self.free:
                page = heapq.heappop(self.free)
            else:
                page, _ = self.idle.popitem(last=False)
                del self.page_of[self.key_of.pop(page)]
            self.users[page] = 1
            taken.append(page)
        return taken

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning, one user more for each."""
        pages = []
        for key in keys:
            page = self.page_of.get(key)
            if page is None:
                break
            self.idle.pop(page, None)
            self.users[page] += 1
            pages.append(page)
        return pages

    def hold(self, pages: Sequence[int]) -> list[int]:
        """The same pages for one user more, of those that have one."""
        for page in pages:
            assert self.users[page], f"nobody uses page {page}"
            self.users[page] += 1
        return list(pages)

    def publish(self, page: int, key: bytes) -> None:
        """Let others share this full page. Where another page has the same content already, that one stays the known one."""
        if key not in self.page_of and page not in self.key_of:
            self.key_of[page], self.page_of[key] = key, page

    def offer(self, tokens: Sequence[int], pages: Sequence[int], keys: Sequence[bytes], salt: bytes) -> list[bytes]:
        """Publish the full pages of a text of which `tokens` are read; the keys of all of them (`keys` were known before)."""
        keys = page_keys(tokens, self.size, salt, keys)
        for page, key in zip(pages, keys, strict=False):
            self.publish(page, key)
        return keys

    def release(self, pages: Sequence[int]) -> None:
        """One user less for each. The last pages of a text are the first to go: its beginning is worth more."""
        for page in reversed(pages):
            self.users[page] -= 1
            assert self.users[page] >= 0, f"page {page} was released twice"
            if self.users[page]:
                continue
            if page in self.key_of:
                self.idle[page] = None
            else:
                heapq.heappush(self.free, page)


def page_keys(tokens: Sequence[int], size: int, salt: bytes, known: Sequence[bytes] = ()) -> list[bytes]:
    """A key for each full page of a text; `known` are those of its first pages. The hash is one that nobody finds collisions
    of, for a page of another text would be read as one's own."""
    keys = list(known)
    for start in range(len(keys) * size, len(tokens) - size + 1, size):
        before = keys[-1] if keys else salt
        keys.append(
            hashlib.blake2b(before + array("q", tokens[start : start + size]).tobytes(), digest_size=16).digest()
        )
    return keys

"""Which sequences begin with the same full pages of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def extend_digests(digests: list[bytes], tokens: Sequence[int], page_size: int, pages: int) -> None:
    """Appends the digests of full pages until there are as many as `pages`.

    A page's digest covers its tokens and all before them. It is cryptographic: whoever could make two prompts collide
    would read another's context.

    Args:
        digests: those of the first pages, extended in place.
        tokens: ids, at least `pages` x `page_size`.
        page_size: tokens in a page.
        pages: how many digests are wanted.
    """
    for page in range(len(digests), pages):
        block = np.array(tokens[page * page_size : (page + 1) * page_size], np.int64)
        before = digests[-1] if digests else b""
        digests.append(hashlib.blake2b(before + block.tobytes(), digest_size=16).digest())


class PrefixIndex:
    """The sequences whose pages can be shared, by the digests of their full pages."""

    def __init__(self) -> None:
        self._holders: dict[bytes, dict[int, None]] = {}
        self._digests: dict[int, list[bytes]] = {}

    def update(self, sequence: int, digests: Sequence[bytes]) -> None:
        """Makes the first pages of a sequence known, which may have been known in part."""
        known = self._digests.setdefault(sequence, [])
        for digest in digests[len(known) :]:
            known.append(digest)
            self._holders.setdefault(digest, {})[sequence] = None

    def remove(self, sequence: int) -> None:
        """Forgets a sequence; nothing happens where it is not known."""
        for digest in self._digests.pop(sequence, ()):
            holders = self._holders[digest]
            del holders[sequence]
            if not holders:
                del self._holders[digest]

    def holders(self, digest: bytes) -> tuple[int, ...]:
        """The sequences that hold a page with all pages before it, those known longest first."""
        return tuple(self._holders.get(digest, ()))

    def longest(self, digests: Sequence[bytes]) -> tuple[int, int] | None:
        """The sequence that shares most of the first pages with these digests, and how many; None where none does."""
        pages = 0
        while pages < len(digests) and digests[pages] in self._holders:
            pages += 1
        return (next(iter(self._holders[digests[pages - 1]])), pages) if pages else None

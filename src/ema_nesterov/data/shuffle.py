"""Documents of a list of sources through a shuffle buffer, from any position on.

The sources are put in a random order; a buffer holds the first K documents, and each further one takes the
place of a random one, which is read. `datasets` (before its version 5) orders a shuffled stream so, and its
random numbers are used here: one epoch is, document for document, what one of its processes reads.

Which document is read at position n depends on random numbers and on nothing in the documents, so the buffer
at n is known without them (a second for 10^8 positions), and only its documents are read again: they lie in
the sources behind position n, a dozen buffers back at most. How many documents each source holds, which is
learned as it is read, says where they begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np

BLOCK = 1000  # random numbers drawn at a time, as datasets does
CHUNK = 1_000_000

Read = Callable[[int, int], Iterator[list[str]]]  # (source, documents to skip) -> its other documents


class ShuffledStream:
    """sources: how many. read: their documents. counts: documents of each source, where known; it is filled in.

    Epochs follow each other without end, each in another order.
    """

    def __init__(self, sources: int, read: Read, buffer: int, seed: int, counts: dict[int, int]):
        self.sources, self.read, self.buffer, self.seed, self.counts = sources, read, buffer, seed, counts

    def documents(self, position: int) -> Iterator[tuple[int, str]]:
        """(epoch, document) from a position of the stream on; ends only where there are no documents at all."""
        epoch = 0
        while True:
            if self._total():
                passed, position = divmod(position, self._total())
                epoch += passed
            try:
                for text in self._epoch(epoch, position):
                    yield epoch, text
                epoch, position = epoch + 1, 0
            except _EndFound:  # the position lies behind an end that was not known
                pass
            if not any(self.counts.values()):
                return

    def _total(self) -> int:
        """Documents of an epoch; 0 as long as that is not known."""
        return sum(self.counts.values()) if len(self.counts) == self.sources else 0

    def _epoch(self, epoch: int, position: int) -> Iterator[str]:
        """The documents of an epoch but the first `position`."""
        order = list(range(self.sources))
        self._generator(epoch).shuffle(order)
        rng = self._generator(epoch)
        drawn = position
        if self._total():  # the last of an epoch are read without a draw
            drawn = min(position, max(0, self._total() - self.buffer))
        slots, draws = self._replay(rng, drawn)
        held, arriving = self._hold(order, slots, self.buffer + drawn)
        for text in arriving:
            place = next(draws)
            yield held[place]
            held[place] = text
        rng.shuffle(held)
        yield from held[position - drawn :]

    def _replay(self, rng: np.random.Generator, drawn: int) -> tuple[np.ndarray, Iterator[int]]:
        """Which document lies in each place of the buffer after so many draws, and the draws that follow."""
        slots, spare = np.arange(self.buffer), np.empty(0, np.int64)
        for start in range(0, drawn, CHUNK):
            size = min(CHUNK, drawn - start)
            places = rng.integers(0, self.buffer, size=-(-size // BLOCK) * BLOCK)
            slots[places[:size]] = self.buffer + start + np.arange(size)  # of several the last one stays
            spare = places[size:]
        return slots, chain(spare.tolist(), _draws(rng, self.buffer))

    def _hold(self, order: list[int], slots: np.ndarray, end: int) -> tuple[list[str], Iterator[str]]:
        """The documents of these numbers by their places, and an iterator over those from number `end` on."""
        first, known = int(slots.min()), self._total()
        documents = self._from(order, first)
        places = {int(number): place for place, number in enumerate(slots)}
        held: dict[int, str] = {}
        for number in range(first, end):
            text = next(documents, None)
            if text is None:
                if end > self.buffer and not known:
                    raise _EndFound
                break  # the buffer holds all there are
            if number in places:
                held[places[number]] = text
        return [held[place] for place in sorted(held)], documents

    def _from(self, order: list[int], number: int) -> Iterator[str]:
        """The documents in the order of their sources, from the number-th on."""
        for source in order:
            known = self.counts.get(source)
            skip = 0 if known is None else min(number, known)
            number -= skip
            if known is not None and skip == known:
                continue
            seen = skip
            for texts in self.read(source, skip):
                drop = min(number, len(texts))
                number -= drop
                seen += len(texts)
                yield from texts[drop:]
            self.counts[source] = seen

    def _generator(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng(self.seed if epoch == 0 else [self.seed, epoch])


class _EndFound(Exception):
    """The last source has ended before a position that was sought."""


def _draws(rng: np.random.Generator, size: int) -> Iterator[int]:
    while True:
        yield from rng.integers(0, size, size=BLOCK).tolist()

"""The longest row that fits, in tokens."""

from collections.abc import Callable

#: Rows are looked for in multiples of this many tokens, and to this share of their length.
STEP, PRECISION = 64, 1 / 128

#: Lengths that a row is reported in: as many to each doubling, so that the next is 1.6 to 3.1 % longer.
STEPS_TO_DOUBLE = 32


def round_length(length: int) -> int:
    """The largest reported length that is no longer."""
    step = max(STEP, (1 << length.bit_length() - 1) // STEPS_TO_DOUBLE) if length else STEP
    return length // step * step


class LongestRow:
    """Searches along one curve of memory over length; what was computed for one card helps the next.

    Args:
        needs: bytes for a row of so many tokens; never falls.
        at_most: tokens.
    """

    def __init__(self, needs: Callable[[int], int], at_most: int) -> None:
        self._needs, self.at_most = needs, max(STEP, at_most // STEP * STEP)
        self._known: dict[int, int] = {}

    def within(self, room_bytes: int) -> int:
        """The longest row that needs no more than this; 0 where not even the shortest does.

        The curve is nearly a line, so that the place where a line between two known points crosses the room is nearly the
        answer already.
        """
        low, high = STEP, self.at_most
        if self._need(low) > room_bytes:
            return 0
        if self._need(high) <= room_bytes:
            return high
        low = max(length for length, need in self._known.items() if need <= room_bytes)
        high = min(length for length, need in self._known.items() if need > room_bytes)
        while True:
            share = (room_bytes - self._known[low]) / (self._known[high] - self._known[low])
            guess = min(low + int((high - low) * share) // STEP * STEP, high - STEP)
            if guess - low <= low * PRECISION:  # nearly there, unless the curve bends upwards: a look beyond
                guess = low + max(STEP, int(4 * PRECISION * low) // STEP * STEP)
                if guess >= high:
                    return low
            if self._need(guess) <= room_bytes:
                low = guess
            else:
                high = guess

    @property
    def least_bytes(self) -> int:
        """What the shortest row needs."""
        return self._need(STEP)

    def _need(self, length: int) -> int:
        if length not in self._known:
            self._known[length] = self._needs(length)
        return self._known[length]

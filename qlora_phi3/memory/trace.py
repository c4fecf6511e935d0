"""The allocations of a simulated run in order, and how they continue for a model with more layers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise

from qlora_phi3.memory.cost import Kernel
from qlora_phi3.memory.report import CUBLAS_WORKSPACE, MemoryReport

#: Sizes that differ by less are taken as alike: the norms of all gradients in one tensor are more with every layer.
ALIKE_BYTES = 512
#: Of one event, what is alike in every layer: its bytes in ALIKE_BYTES, negative where they are freed, and its category.
_Kind = tuple[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What a simulation recorded."""

    #: (storage id, bytes) for an allocation, (storage id, 0) for its end.
    events: Sequence[tuple[int, int]]
    #: Storage id -> category.
    categories: Mapping[int, str]
    #: Phase -> number of events when it began, and after its first matrix product.
    phases: Mapping[str, int]
    first_products: Mapping[str, int]
    paged_bytes: int
    host_bytes: int
    #: Bytes up to a multiple of which each allocation is rounded in a report.
    rounding: int
    #: Phase -> kernel -> how often it is started.
    kernels: Mapping[str, Mapping[Kernel, int]]

    def report(self) -> MemoryReport:
        """The memory at its peak, by phase and by category."""
        rounded = [(number, -(-num_bytes // self.rounding) * self.rounding) for number, num_bytes in self.events]
        trace = replace(self, events=rounded)
        peaks = trace._peaks()
        peak_phase, (allocated_bytes, event) = max(peaks.items(), key=lambda item: item[1][0])
        return MemoryReport(
            allocated_bytes=allocated_bytes,
            by_category=trace._live_at(event),
            by_phase={phase: num_bytes for phase, (num_bytes, _) in peaks.items()},
            peak_phase=peak_phase,
            resident_bytes=peaks["save"][0],
            paged_bytes=self.paged_bytes,
            host_bytes=self.host_bytes,
            trace=trace._with_second_step(),
        )

    def kept_bytes(self) -> int:
        """What a forward pass leaves for the backward pass."""
        begin, end = self.phases["forward"], self.phases["backward"]
        return sum(self._live_at(end).values()) - sum(self._live_at(begin).values())

    def _peaks(self) -> dict[str, tuple[int, int]]:
        """Phase -> most bytes that are allocated at once, and the number of events by then."""
        sizes = dict(event for event in self.events if event[1])
        live = [0, *accumulate(num_bytes or -sizes[number] for number, num_bytes in self.events)]
        peaks = {}
        for (phase, begin), (_, end) in pairwise([("load", 0), *self.phases.items()]):
            most = max(range(begin, end + 1), key=live.__getitem__)
            peaks[phase] = live[most], most
        return peaks

    def _live_at(self, num_events: int) -> dict[str, int]:
        """Category -> bytes allocated after so many events, largest first."""
        by_category: Counter[str] = Counter()
        for number, num_bytes in dict(self.events[:num_events]).items():
            if num_bytes:
                by_category[self.categories[number]] += num_bytes
        return dict(by_category.most_common())

    def _with_second_step(self) -> tuple[tuple[int, int], ...]:
        """All events, with those of the step twice: the first step leaves a cache that is fragmented.

        What outlives a step is allocated once: cuBLAS' workspaces, which the peaks have from the first phase on, with the first
        products of the two passes.
        """
        begin, end = self.phases["update"], self.phases["end"]
        workspaces = [event for event in self.events if self.categories[event[0]] == CUBLAS_WORKSPACE]
        phases = "load" if "load" in self.first_products else "forward", "backward"
        places = dict(zip((self.first_products.get(phase) for phase in phases), workspaces, strict=False))
        first = []
        for index, event in enumerate(self.events[:end]):
            if index in places:
                first.append(places[index])
            if event not in workspaces:
                first.append(event)
        step = self.events[begin:end]
        temporary = {number for number, num_bytes in step if num_bytes} & {number for number, num_bytes in step if not num_bytes}
        unused = max(self.categories) + 1
        again = [(number + unused, num_bytes) for number, num_bytes in step if number in temporary]
        return *first, *again


def add_layers(small: Trace, large: Trace, times: int) -> Trace | None:
    """The trace of a model that has `times` as many more layers than `large`, as `large` has more than `small`.

    Each pass over the layers is a sequence that repeats; `large` has it once more than `small` in each of several places. What
    such an event frees may have been allocated in another place, such as one that the forward pass saved: from one repetition to
    the next, and from `small` to `large`, that allocation lies a constant number of events further on, or less far.

    Returns:
        None where the two do not differ in this way.
    """
    kinds_small, values_small = _kinds(small)
    kinds, values = _kinds(large)
    if (places := _insertions(kinds_small, kinds)) is None:
        return None
    sequence: list[tuple[_Kind, int]] = []
    position = added = 0
    for begin, length in [*places, (len(kinds), 0)]:
        for index in range(position, begin):
            growth = values[index] - values_small[index - added]
            sequence.append((kinds[index], values[index] + times * growth))
        for again in range(times + 1):
            for index in range(begin, begin + length):
                before = values[index - length]
                growth = again * (values[index] - before) + times * (before - values_small[index - length - added])
                sequence.append((kinds[index], values[index] + growth))
        position, added = begin + length, added + length
    if not _is_sound(sequence):
        return None

    def continued(of_small: Mapping[str, int], of_large: Mapping[str, int]) -> dict[str, int]:
        return {name: index + times * (index - of_small[name]) for name, index in of_large.items()}

    return Trace(
        events=[(index, value) if size > 0 else (value, 0) for index, ((size, _), value) in enumerate(sequence)],
        categories={index: category for index, ((size, category), _) in enumerate(sequence) if size > 0},
        phases=continued(small.phases, large.phases),
        first_products=continued(small.first_products, large.first_products),
        paged_bytes=large.paged_bytes + times * (large.paged_bytes - small.paged_bytes),
        host_bytes=large.host_bytes + times * (large.host_bytes - small.host_bytes),
        rounding=large.rounding,
        kernels={},
    )


def _kinds(trace: Trace) -> tuple[list[_Kind], list[int]]:
    """Each event's kind, and the bytes that it allocates, or the index of the event whose storage it frees."""
    begun: dict[int, tuple[int, int]] = {}
    kinds, values = [], []
    for index, (number, num_bytes) in enumerate(trace.events):
        begin, size = begun.setdefault(number, (index, -(-num_bytes // ALIKE_BYTES)))
        kinds.append((size if num_bytes else -size, trace.categories[number]))
        values.append(num_bytes or begin)
    return kinds, values


def _insertions(small: Sequence[_Kind], large: Sequence[_Kind]) -> list[tuple[int, int]] | None:
    """Where `large` repeats what precedes, and `small` does not: first index and length of each repetition."""
    places: list[tuple[int, int]] = []
    at = index = end = 0
    while index < len(large):
        if at < len(small) and small[at] == large[index]:
            at, index = at + 1, index + 1
            continue
        left = len(large) - len(small) - (index - at)
        lengths = [n for n in range(1, min(left, index) + 1) if large[index - n : index] == large[index : index + n]]
        if not lengths:
            return None
        best = max(lengths, key=lambda length: (_num_equal(small, at, large, index + length), length))
        first = index - 1  # of the events that repeat
        while first > end and large[first - 1] == large[first - 1 + best]:
            first -= 1
        places.append((index - max(0, index - first - best) // 3, best))
        index = end = index + best
    return places if at == len(small) else None


def _num_equal(small: Sequence[_Kind], at: int, large: Sequence[_Kind], index: int) -> int:
    """How many events are alike from there on."""
    count = 0
    while at + count < len(small) and index + count < len(large) and small[at + count] == large[index + count]:
        count += 1
    return count


def _is_sound(sequence: Sequence[tuple[_Kind, int]]) -> bool:
    """Whether what is freed is alive, and of that kind."""
    alive: dict[int, _Kind] = {}
    for index, ((size, category), freed) in enumerate(sequence):
        if size > 0:
            alive[index] = size, category
        elif alive.pop(freed, None) != (-size, category):
            return False
    return True


def in_order(events: Sequence[tuple[int, int]], boundaries: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Events, of which those that free one after the other are in the order of the allocations.

    The allocator is in the same state after them in any order, and autocast frees the weights that it cast in no order.

    Args:
        boundaries: numbers of events across which nothing changes its place.
    """
    ordered: list[tuple[int, int]] = []
    begins = sorted({0, *boundaries, len(events)})
    for begin, end in pairwise(begins):
        for is_free, run in groupby(events[begin:end], key=lambda event: not event[1]):
            ordered += (sorted if is_free else list)(run)
    return tuple(ordered)

"""What PyTorch's CUDA caching allocator reserves on the GPU for a sequence of allocations, in bytes.

A model of c10/cuda/CUDACachingAllocator.cpp as of torch 2.13 with its default settings; one stream, no CUDA graphs. Its rules:

- A request is rounded up to 512 bytes. Up to 1 MiB it belongs to the small pool, else to the large one.
- The smallest cached block that is large enough serves it, of equal ones the one at the lowest address. The rest is split off and
  stays cached; in the large pool without expandable segments only where it is more than 1 MiB: else the block counts in full.
- Where no block fits, a segment is reserved: 2 MiB for the small pool, 20 MiB for requests under 10 MiB, else the request
  rounded up to 2 MiB. With expandable segments each pool is one segment that grows at its end, in pages of 2 MiB (small) or
  20 MiB (large); a cached block at that end counts, for best fit, as large as it could grow, so it is used last.
- A freed block merges with cached neighbours of its segment. Where a reservation is refused, every segment (every complete page)
  that holds nothing in use is returned, and the reservation is tried once more; refused again it is an OutOfMemoryError.

Segments are assumed to follow one another in memory, which decides only between cached blocks of equal size.
"""

import os
import platform
import re
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from qlora_phi3.units import MIB

ROUNDING_BYTES = 512
SMALL_REQUEST_BYTES = MIB
SMALL_PAGE_BYTES, LARGE_PAGE_BYTES = 2 * MIB, 20 * MIB
#: From this size on a request has a segment of its own, rounded up to `LARGE_ROUNDING_BYTES`.
OWN_SEGMENT_BYTES = 10 * MIB
LARGE_ROUNDING_BYTES = 2 * MIB
#: A rest up to this size is not split off in the large pool (without expandable segments).
UNSPLIT_BYTES = MIB
#: In a trace, frees every cached segment, as `torch.cuda.empty_cache()` does.
EMPTY_CACHE = (-1, 0)
#: Environment variables with torch's settings of the allocator; the first that is set counts (c10/core/AllocatorConfig.h).
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
#: torch reserves addresses for 9/8 of the GPU's memory; here there are always enough.
ADDRESS_SPACE_BYTES = LARGE_PAGE_BYTES * 2**20
ADDRESS_BITS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What the allocator held for a trace, in bytes."""

    #: Of the blocks in use, as `torch.cuda.max_memory_allocated()` and `memory_allocated()` count them.
    peak_allocated_bytes: int
    final_allocated_bytes: int
    #: Reserved on the GPU, as `torch.cuda.max_memory_reserved()` and `memory_reserved()` count them.
    peak_reserved_bytes: int
    final_reserved_bytes: int
    #: Times a refused reservation emptied the cache, `num_alloc_retries` in `torch.cuda.memory_stats()`; the GPU waits for it.
    cache_flushes: int
    #: The event that was refused even then; the trace ends there. None where everything fitted.
    out_of_memory_event: int | None

    @property
    def fits(self) -> bool:
        return self.out_of_memory_event is None


def replay(
    trace: Iterable[tuple[int, int]],
    *,
    expandable_segments: bool,
    limit_bytes: int | None = None,
    allowed_bytes: int | None = None,
) -> Footprint:
    """Serve a trace, starting from an empty GPU.

    Args:
        trace: (storage id, bytes > 0) allocates, (storage id, 0) frees, `EMPTY_CACHE` empties the cache.
        expandable_segments: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; see `expandable_segments_work`.
        limit_bytes: what the GPU can give this process, its CUDA context not counted.
        allowed_bytes: as `torch.cuda.set_per_process_memory_fraction` sets it. torch checks whether a complete new segment
            would stay below it, also where an expandable one would grow by less, or by up to a page more.

    Raises:
        ValueError: the trace allocates a storage that is alive, or frees one that is not.
    """
    allocator = _Allocator(expandable_segments, limit_bytes, allowed_bytes)
    live: dict[int, _Block] = {}
    refused = None
    for event, (storage, num_bytes) in enumerate(trace):
        if num_bytes:
            if storage in live:
                raise ValueError(f"Event {event} allocates storage {storage}, which is alive.")
            if (block := allocator.allocate(num_bytes)) is None:
                refused = event
                break
            live[storage] = block
        elif storage in live:
            allocator.free(live.pop(storage))
        elif (storage, num_bytes) == EMPTY_CACHE:
            allocator.release_cached()
        else:
            raise ValueError(f"Event {event} frees storage {storage}, which is not alive.")
    return Footprint(
        peak_allocated_bytes=allocator.peak_allocated,
        final_allocated_bytes=allocator.allocated,
        peak_reserved_bytes=allocator.peak_reserved,
        final_reserved_bytes=allocator.reserved,
        cache_flushes=allocator.flushes,
        out_of_memory_event=refused,
    )


def uses_expandable_segments() -> bool:
    """Whether a run on this computer has expandable segments: where they work, unless the user has set something else."""
    setting = next((os.environ[name] for name in ALLOCATOR_SETTINGS if name in os.environ), "expandable_segments:True")
    wanted = re.search(r"expandable_segments:\s*true", setting, re.IGNORECASE) is not None
    return wanted and expandable_segments_work(platform.system(), platform.release())


def expandable_segments_work(system: str, release: str) -> bool:
    """Whether torch's expandable segments can be switched on, from `platform.system()` and `platform.release()`.

    Linux only: torch 2.13 for Windows ignores the setting with a warning (CUDAAllocatorConfig.h). Under WSL the driver refuses
    to map memory on some GPUs, such as an RTX A4000 (pytorch issue 192330), and so it does on Jetson boards, whose kernels
    are called "...-tegra" (unsloth-zoo pull request 1235).
    """
    return system == "Linux" and not any(word in release.lower() for word in ("microsoft", "tegra"))


class _Block:
    """A part of one segment: in use, cached, or (expandable segments) addresses without memory."""

    __slots__ = ("address", "after", "before", "in_use", "mapped", "pool", "size")

    def __init__(self, pool: "_Pool", address: int, size: int, *, mapped: bool = True) -> None:
        self.pool, self.address, self.size, self.mapped, self.in_use = pool, address, size, mapped, False
        self.before: _Block | None = None
        self.after: _Block | None = None

    def cut(self, size: int) -> "_Block":
        """Shorten this block to `size`; the rest, which follows it, is returned and belongs to no list yet."""
        rest = _Block(self.pool, self.address + size, self.size - size, mapped=self.mapped)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def growable_size(self) -> int:
        """The size that a cached block could grow to in place."""
        return self.size if self.after is None or self.after.mapped else self.size + self.after.size

    def absorb_neighbours(self) -> None:
        """Merge with the blocks before and after it that are in the same state."""
        before, after = self.before, self.after
        if before is not None and not before.in_use and before.mapped == self.mapped:
            before.pool.remove(before)
            self.address, self.size, self.before = before.address, before.size + self.size, before.before
            if self.before is not None:
                self.before.after = self
        if after is not None and not after.in_use and after.mapped == self.mapped:
            after.pool.remove(after)
            self.size, self.after = self.size + after.size, after.after
            if self.after is not None:
                self.after.before = self


class _Pool:
    """The blocks of the small or of the large pool that are not in use."""

    def __init__(self, *, is_small: bool, expandable: bool, base_address: int) -> None:
        self.expandable = expandable
        self.page = SMALL_PAGE_BYTES if is_small else LARGE_PAGE_BYTES
        self.smallest_rest = ROUNDING_BYTES if is_small or expandable else UNSPLIT_BYTES + 1
        #: The cached blocks under one key for size and address; those keys in order; the blocks without memory, by address.
        self.cached, self.cached_keys, self.unmapped = dict[int, _Block](), list[int](), list[_Block]()
        if expandable:
            self.add(_Block(self, base_address, ADDRESS_SPACE_BYTES, mapped=False))

    def add(self, block: _Block) -> None:
        if block.mapped:
            key = block.size << ADDRESS_BITS | block.address
            insort(self.cached_keys, key)
            self.cached[key] = block
        else:
            insort(self.unmapped, block, key=lambda other: other.address)

    def remove(self, block: _Block) -> None:
        if block.mapped:
            key = block.size << ADDRESS_BITS | block.address
            del self.cached_keys[bisect_left(self.cached_keys, key)]
            del self.cached[key]
        else:
            self.unmapped.remove(block)

    def take_best_fit(self, size: int) -> _Block | None:
        """Take the smallest cached block of at least `size`; an expandable one counts as large as it can grow."""
        keys = self.cached_keys
        index = bisect_left(keys, size << ADDRESS_BITS)
        if index == len(keys):
            return None
        if self.expandable:
            least = self.cached[keys[index]].growable_size()
            while index + 1 < len(keys) and (larger := self.cached[keys[index + 1]].growable_size()) < least:
                index, least = index + 1, larger
        return self.cached.pop(keys.pop(index))

    def find_growable(self, size: int) -> _Block:
        """The lowest block without memory, or the cached one right before it, from which on `size` bytes are not in use."""
        for unmapped in self.unmapped:
            start = unmapped.before if unmapped.before is not None and not unmapped.before.in_use else unmapped
            block: _Block | None = start
            missing = size
            while block is not None and not block.in_use and missing > 0:
                missing, block = missing - block.size, block.after
            if missing <= 0:
                return start
        raise AssertionError("The last unmapped block is larger than any request.")


class _Allocator:
    def __init__(self, expandable: bool, limit_bytes: int | None, allowed_bytes: int | None) -> None:
        self.limit_bytes, self.allowed_bytes = limit_bytes, allowed_bytes
        self.small = _Pool(is_small=True, expandable=expandable, base_address=0)
        self.large = _Pool(is_small=False, expandable=expandable, base_address=ADDRESS_SPACE_BYTES)
        self.next_address = 0
        self.allocated = self.peak_allocated = self.reserved = self.peak_reserved = self.flushes = 0

    def allocate(self, num_bytes: int) -> _Block | None:
        """A block of at least `num_bytes`; None where the GPU has not that much memory."""
        size = -(-num_bytes // ROUNDING_BYTES) * ROUNDING_BYTES
        pool = self.small if size <= SMALL_REQUEST_BYTES else self.large
        block = pool.take_best_fit(size) or self._reserve(pool, size)
        if block is None:
            self.flushes += 1
            self.release_cached()
            if (block := self._reserve(pool, size)) is None:
                return None
        if block.size - size >= pool.smallest_rest:
            pool.add(block.cut(size))
        block.in_use = True
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: _Block) -> None:
        block.in_use = False
        self.allocated -= block.size
        block.absorb_neighbours()
        block.pool.add(block)

    def release_cached(self) -> None:
        """Return every segment, or complete page of an expandable one, that holds nothing in use."""
        for pool in (self.large, self.small):
            for block in list(pool.cached.values()):
                if pool.expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _reserve(self, pool: _Pool, size: int) -> _Block | None:
        """A block of at least `size` that takes more memory from the GPU; None where that is refused."""
        if size <= SMALL_REQUEST_BYTES:
            segment = SMALL_PAGE_BYTES
        elif size < OWN_SEGMENT_BYTES:
            segment = LARGE_PAGE_BYTES
        else:
            segment = -(-size // LARGE_ROUNDING_BYTES) * LARGE_ROUNDING_BYTES
        if self.allowed_bytes is not None and self.reserved + segment > self.allowed_bytes:
            return None
        if pool.expandable:
            return self._grow(pool, size)
        self.next_address += segment
        return _Block(pool, self.next_address - segment, segment) if self._count(segment) else None

    def _count(self, num_bytes: int) -> bool:
        """Add to what is reserved, unless the GPU cannot give it."""
        if self.limit_bytes is not None and self.reserved + num_bytes > self.limit_bytes:
            return False
        self.reserved += num_bytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _grow(self, pool: _Pool, size: int) -> _Block | None:
        """A block of at least `size` at the end of an expandable segment, or in a gap of it; None where that is refused."""
        block = pool.find_growable(size)
        while not block.mapped or block.size < size:
            missing = block if not block.mapped else block.after
            wanted = size if not block.mapped else size - block.size
            if missing is None or not self._map(missing, min(wanted, missing.size)):
                return None
            block = missing  # it has absorbed the cached block before it
        pool.remove(block)
        return block

    def _map(self, block: _Block, size: int) -> bool:
        """Map memory to the first `size` bytes of a block, in complete pages, and cache it."""
        pages = -(-size // block.pool.page) * block.pool.page
        if not self._count(pages):
            return False
        block.pool.remove(block)
        if pages < block.size:
            block.pool.add(block.cut(pages))
        block.mapped = True
        block.absorb_neighbours()
        block.pool.add(block)
        return True

    def _unmap(self, block: _Block) -> None:
        """Return the complete pages inside a cached block; what is left of it stays cached."""
        pool = block.pool
        begin = -(-block.address // pool.page) * pool.page
        end = (block.address + block.size) // pool.page * pool.page
        if begin >= end:
            return
        pool.remove(block)
        if begin > block.address:
            head, block = block, block.cut(begin - block.address)
            pool.add(head)
        if end < block.address + block.size:
            pool.add(block.cut(end - block.address))
        self.reserved -= block.size
        block.mapped = False
        block.absorb_neighbours()
        pool.add(block)

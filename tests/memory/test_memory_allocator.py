"""The model of PyTorch's caching allocator, rule by rule, on sequences worked out by hand."""

import platform
import random

import pytest

from qlora_phi3.memory.allocator import EMPTY_CACHE, expandable_segments_work, replay, uses_expandable_segments
from qlora_phi3.units import MIB


def classic(*trace, **limits):
    return replay(trace, expandable_segments=False, **limits)


def expandable(*trace, **limits):
    return replay(trace, expandable_segments=True, **limits)


def test_a_request_is_rounded_up_to_512_bytes():
    assert classic((1, 1)).peak_allocated_bytes == 512
    assert classic((1, 512)).peak_allocated_bytes == 512
    assert classic((1, 513)).peak_allocated_bytes == 1024


def test_small_requests_share_segments_of_2_mib():
    two_in_one = classic((1, MIB), (2, MIB))
    assert (two_in_one.peak_reserved_bytes, two_in_one.peak_allocated_bytes) == (2 * MIB, 2 * MIB)
    assert classic((1, MIB), (2, MIB), (3, 1)).peak_reserved_bytes == 4 * MIB


def test_requests_over_1_mib_and_under_10_mib_share_segments_of_20_mib():
    footprint = classic((1, MIB + 1), (2, 10 * MIB - 512), (3, 8 * MIB))
    assert footprint.peak_reserved_bytes == 20 * MIB
    assert classic((1, 9 * MIB), (2, 9 * MIB), (3, 9 * MIB)).peak_reserved_bytes == 40 * MIB


def test_a_request_of_10_mib_or_more_has_its_own_segment_rounded_up_to_2_mib():
    assert classic((1, 10 * MIB)).peak_reserved_bytes == 10 * MIB
    assert classic((1, 10 * MIB + 1)).peak_reserved_bytes == 12 * MIB


def test_small_and_large_requests_never_share_a_segment():
    footprint = classic((1, 19 * MIB), (1, 0), (2, MIB))
    assert footprint.peak_reserved_bytes == 20 * MIB + 2 * MIB


def test_a_rest_of_up_to_1_mib_remains_in_its_block_in_the_large_pool_and_counts_as_allocated():
    assert classic((1, 11 * MIB)).peak_allocated_bytes == 12 * MIB
    assert classic((1, 11 * MIB - 512)).peak_allocated_bytes == 11 * MIB - 512
    assert classic((1, 1024), (1, 0), (2, MIB - 512)).peak_allocated_bytes == MIB - 512
    assert expandable((1, 20 * MIB - 512)).peak_allocated_bytes == 20 * MIB - 512


def test_the_smallest_cached_block_that_fits_is_used():
    # Cached: 30 and 12 MiB. 11.5 MiB takes the 12; a later 30 finds its segment complete.
    trace = [(1, 30 * MIB), (2, 12 * MIB), (1, 0), (2, 0), (3, 11 * MIB + MIB // 2), (4, 30 * MIB)]
    assert classic(*trace).peak_reserved_bytes == 42 * MIB


def test_of_equal_cached_blocks_the_one_at_the_lowest_address_is_used():
    # Four blocks of 4 MiB in 20; the first, the third and the end are free and of equal size. Only when the new block takes the
    # first do the third, the fourth and the end make 12 MiB in a row.
    trace = [(1, 4 * MIB), (2, 4 * MIB), (3, 4 * MIB), (4, 4 * MIB), (1, 0), (3, 0), (5, 4 * MIB), (4, 0)]
    assert classic(*trace, (6, 9 * MIB)).peak_reserved_bytes == 20 * MIB


def test_freed_neighbours_merge():
    trace = [(1, 6 * MIB), (2, 6 * MIB), (3, 6 * MIB), (1, 0), (2, 0), (4, 9 * MIB)]
    assert classic(*trace).peak_reserved_bytes == 20 * MIB
    apart = [(1, 6 * MIB), (2, 6 * MIB), (3, 6 * MIB), (1, 0), (3, 0), (4, 9 * MIB)]
    assert classic(*apart).peak_reserved_bytes == 40 * MIB


def test_segments_of_10_mib_and_more_do_not_merge_with_each_other():
    assert classic((1, 10 * MIB), (2, 10 * MIB), (1, 0), (2, 0), (3, 20 * MIB)).peak_reserved_bytes == 40 * MIB
    assert expandable((1, 10 * MIB), (2, 10 * MIB), (1, 0), (2, 0), (3, 20 * MIB)).peak_reserved_bytes == 20 * MIB


def test_freed_memory_stays_reserved_until_the_cache_is_emptied():
    kept = classic((1, 50 * MIB), (1, 0))
    assert (kept.final_allocated_bytes, kept.final_reserved_bytes) == (0, 50 * MIB)
    assert classic((1, 50 * MIB), (1, 0), EMPTY_CACHE).final_reserved_bytes == 0


def test_emptying_the_cache_keeps_a_segment_of_which_a_part_is_in_use():
    footprint = classic((1, 8 * MIB), (2, 8 * MIB), (3, 40 * MIB), (1, 0), (3, 0), EMPTY_CACHE)
    assert footprint.final_reserved_bytes == 20 * MIB


def test_an_expandable_segment_grows_in_pages_of_2_and_20_mib():
    assert expandable((1, 1)).peak_reserved_bytes == 2 * MIB
    assert expandable((1, 2 * MIB)).peak_reserved_bytes == 20 * MIB
    assert expandable((1, 21 * MIB)).peak_reserved_bytes == 40 * MIB
    assert expandable((1, 15 * MIB), (2, 20 * MIB), (3, 25 * MIB)).peak_reserved_bytes == 60 * MIB


def test_an_expandable_segment_grows_only_by_what_its_free_end_lacks():
    # 100 MiB, freed, then 110 MiB: 10 more are needed, one page.
    trace = [(1, 100 * MIB), (1, 0), (2, 110 * MIB)]
    assert expandable(*trace).peak_reserved_bytes == 120 * MIB
    assert classic(*trace).peak_reserved_bytes == 210 * MIB


def test_the_free_end_of_an_expandable_segment_is_used_last():
    # Free: 30 MiB at the start, 20 MiB at the end, which could grow. 10 MiB comes from the start although the end is smaller,
    # so that a request of 35 MiB grows the end by 15 MiB (one page) and not by 25 (two).
    trace = [(1, 30 * MIB), (2, 10 * MIB), (3, 20 * MIB), (1, 0), (3, 0), (4, 10 * MIB), (5, 35 * MIB)]
    assert expandable(*trace).peak_reserved_bytes == 80 * MIB


def test_emptying_the_cache_returns_the_complete_free_pages_of_an_expandable_segment():
    # Pages of 20 MiB: 1 lies in 0-10, 2 in 10-70, 3 in 70-75 of 80 MiB. Freed, 2 has the pages 20-40 and 40-60 completely.
    trace = [(1, 10 * MIB), (2, 60 * MIB), (3, 5 * MIB), (2, 0), EMPTY_CACHE]
    assert expandable(*trace).final_reserved_bytes == 40 * MIB
    # 10-20 and 60-70 stayed; 60 MiB in that place take the two pages back, not three new ones.
    assert expandable(*trace, (4, 60 * MIB)).final_reserved_bytes == 80 * MIB


def test_an_expandable_pool_can_be_returned_completely():
    assert expandable((1, 70 * MIB), (2, 100), (1, 0), (2, 0), EMPTY_CACHE).final_reserved_bytes == 0


def test_at_the_limit_the_cache_is_emptied_and_the_request_tried_again():
    trace = [(1, 60 * MIB), (1, 0), (2, 80 * MIB)]
    footprint = classic(*trace, limit_bytes=100 * MIB)
    assert footprint.fits
    assert (footprint.peak_reserved_bytes, footprint.cache_flushes) == (80 * MIB, 1)
    assert classic(*trace).cache_flushes == 0


def test_what_does_not_fit_even_then_is_out_of_memory_at_its_event():
    footprint = classic((1, 60 * MIB), (2, 10), (3, 60 * MIB), (3, 0), limit_bytes=100 * MIB)
    assert not footprint.fits
    assert footprint.out_of_memory_event == 2
    assert footprint.final_allocated_bytes == 60 * MIB + 512


def test_a_segment_with_a_small_block_in_use_cannot_be_returned():
    # 12 MiB of 20 are free, but 8 are in use: 90 more do not fit under 100, though only 98 would be in use.
    trace = [(1, 8 * MIB), (2, 90 * MIB)]
    assert not classic(*trace, limit_bytes=100 * MIB).fits
    assert not expandable(*trace, limit_bytes=99 * MIB).fits
    assert expandable(*trace, limit_bytes=100 * MIB).fits


def test_the_gpu_counts_pages_and_torch_counts_complete_new_segments():
    # The free end of 60 MiB has to grow by 10 MiB, one page: 80 MiB. torch adds 60 + 70 before it looks.
    trace = [(1, 50 * MIB), (1, 0), (2, 70 * MIB)]
    assert expandable(*trace, limit_bytes=80 * MIB).cache_flushes == 0
    assert expandable(*trace, allowed_bytes=110 * MIB).cache_flushes == 1
    # And where pages round up, torch lets itself have more than it allowed: 22 MiB asked for, two pages taken.
    assert expandable((1, 21 * MIB), allowed_bytes=22 * MIB).peak_reserved_bytes == 40 * MIB
    assert not expandable((1, 21 * MIB), limit_bytes=39 * MIB).fits


def test_a_trace_that_frees_what_is_not_alive_is_refused():
    with pytest.raises(ValueError, match="Event 1 frees storage 2, which is not alive"):
        classic((1, 10), (2, 0))
    with pytest.raises(ValueError, match="Event 1 allocates storage 1, which is alive"):
        classic((1, 10), (1, 10))


def training_like_trace(seed: int, *, layers: int = 12, steps: int = 3) -> list[tuple[int, int]]:
    """Weights, then steps of a forward pass that keeps one tensor a layer and a backward pass that recomputes each layer."""
    draw = random.Random(seed)
    trace: list[tuple[int, int]] = []
    weights = [draw.choice([4096, 300_000, 14 * MIB, 25 * MIB]) for _ in range(4 * layers)]
    trace += [(index, size) for index, size in enumerate(weights)]
    fresh = len(weights)
    for _ in range(steps):
        tokens = draw.randrange(200, 3000)
        kept = []
        for _ in range(layers):
            trace.append((fresh, tokens * 6144))
            kept.append(fresh)
            fresh += 1
            fresh = layer(trace, fresh, tokens, draw)
        for storage in reversed(kept):
            fresh = layer(trace, fresh, tokens, draw)
            trace.append((storage, 0))
    return trace


def layer(trace: list[tuple[int, int]], fresh: int, tokens: int, draw: random.Random) -> int:
    sizes = [tokens * width * 2 for width in (9216, 3072, 3072, 16384, 8192, 3072)] + [50 * MIB, 3072, 2 * MIB]
    draw.shuffle(sizes)
    alive: list[int] = []
    for size in sizes:
        trace.append((fresh, size))
        alive.append(fresh)
        fresh += 1
        if len(alive) > 4:
            trace.append((alive.pop(draw.randrange(len(alive))), 0))
    trace.extend((storage, 0) for storage in alive)
    return fresh


@pytest.mark.parametrize("expandable_segments", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_reserved_is_never_less_than_allocated_and_freeing_all_leaves_nothing_in_use(seed, expandable_segments):
    trace = training_like_trace(seed)
    for end in range(0, len(trace), 37):
        footprint = replay(trace[:end], expandable_segments=expandable_segments)
        assert footprint.final_reserved_bytes >= footprint.final_allocated_bytes
    alive = {storage for storage, size in trace if size} - {storage for storage, size in trace if not size}
    whole = replay([*trace, *((storage, 0) for storage in alive), EMPTY_CACHE], expandable_segments=expandable_segments)
    assert (whole.final_allocated_bytes, whole.final_reserved_bytes) == (0, 0)
    assert whole.peak_reserved_bytes >= whole.peak_allocated_bytes


@pytest.mark.parametrize("seed", range(6))
def test_expandable_segments_reserve_no_more_than_classic_ones_where_lengths_change(seed):
    trace = training_like_trace(seed)
    one, other = expandable(*trace), classic(*trace)
    assert one.peak_reserved_bytes <= other.peak_reserved_bytes
    assert one.peak_allocated_bytes <= other.peak_allocated_bytes


@pytest.mark.parametrize("expandable_segments", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_fits_under_a_limit_stays_under_it_and_allocates_the_same(seed, expandable_segments):
    trace = training_like_trace(seed)
    free = replay(trace, expandable_segments=expandable_segments)
    limit = (free.peak_allocated_bytes + free.peak_reserved_bytes) // 2
    capped = replay(trace, expandable_segments=expandable_segments, limit_bytes=limit)
    assert capped.peak_reserved_bytes <= limit
    if capped.fits:
        assert capped.final_allocated_bytes <= limit
    assert not replay(trace, expandable_segments=expandable_segments, limit_bytes=free.peak_allocated_bytes - 25 * MIB).fits


@pytest.mark.parametrize(
    ("system", "release", "works"),
    [
        ("Linux", "6.8.0-51-generic", True),
        ("Linux", "5.15.167.4-microsoft-standard-WSL2", False),
        ("Linux", "5.15.148-tegra", False),
        ("Windows", "11", False),
    ],
)
def test_expandable_segments_are_for_linux_outside_of_wsl(system, release, works):
    assert expandable_segments_work(system, release) is works


@pytest.mark.parametrize(
    ("variables", "uses"),
    [
        ({}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64, expandable_segments: True"}, True),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, False),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, True),
    ],
)
def test_a_setting_of_the_user_decides_about_expandable_segments(monkeypatch, variables, uses):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert uses_expandable_segments() is uses

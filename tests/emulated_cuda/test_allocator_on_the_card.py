"""The model of torch's allocator on the requests that the real one got, near a limit, and over many steps of varying lengths.

The requests are read from torch's own memory history of a run on the emulated card, so that only the model can be wrong.
"""

import random

import card
import pytest
import torch
from memory_bench.cases import Case
from memory_bench.truth import build_random, go_once

from qlora_phi3.family import known_config
from qlora_phi3.memory.allocator import replay
from qlora_phi3.memory.tracker import NullTracker
from qlora_phi3.model.optimizer import build_optimizer
from qlora_phi3.step import MicroBatchMemoryError, collate, forward_backward

MIB = 2**20
LAYERS = 4
CONTEXT_MIB = 114


def make_case(*lengths, layers=LAYERS, **more):
    config = {**known_config("microsoft/Phi-3-mini-128k-instruct"), "num_hidden_layers": layers}
    return Case(name="mini", config=config, lengths=lengths, **{"optim": "adamw_8bit", **more})


def start(expandable, total_mib=200_000):
    """A card whose allocator writes down every request."""
    card.choose("rtx3060", total_mib)
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{expandable}")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.cuda.init()
    torch.cuda.memory._record_memory_history(context=None, max_entries=10_000_000)


def requests():
    """The requests until now, as `replay` takes them."""
    trace, alive = [], {}
    for number, event in enumerate(torch.cuda.memory._snapshot()["device_traces"][0]):
        if event["action"] == "alloc":
            alive[event["addr"]] = number
            trace.append((number, event["size"]))
        elif event["action"] == "free_completed" and event["addr"] in alive:
            trace.append((alive.pop(event["addr"]), 0))
    return trace


def real_peaks():
    """Allocated and reserved, in MiB."""
    stats = torch.cuda.memory_stats()
    return [stats[f"{name}_bytes.all.peak"] / MIB for name in ("allocated", "reserved")]


def peaks_of(served):
    """The same of the model."""
    return [served.peak_allocated_bytes / MIB, served.peak_reserved_bytes / MIB]


@pytest.mark.parametrize("expandable", [True, False])
@pytest.mark.parametrize(
    ("lengths", "more"),
    [
        ((2048,), {}),
        ((2048,), {"checkpoint_every": 0}),
        ((1024,), {"attention": "eager"}),
        ((8192,), {"offloading": True}),
        ((40960,), {"offloading": True}),
    ],
)
def test_the_model_reserves_what_the_allocator_does_for_the_same_requests(lengths, more, expandable):
    def work():
        start(expandable)
        card.tell_supervised(sum(lengths) - len(lengths))
        case = make_case(*lengths, **more)
        go_once(build_random(case, torch.device("cuda", 0)), case, NullTracker())
        return [real_peaks(), peaks_of(replay(requests(), expandable_segments=expandable))]

    real, model = card.in_child(work)
    print(real)
    assert model == real


@pytest.mark.parametrize("expandable", [True, False])
def test_near_a_limit_the_model_empties_the_cache_as_often_as_the_allocator(expandable):
    """And it says where nothing helps: from the requests without a limit, at limits between the two peaks."""
    case = make_case(8192, offloading=True)

    def work(total_mib):
        start(expandable, total_mib)
        card.tell_supervised(8191)
        fits = True
        try:
            go_once(build_random(case, torch.device("cuda", 0)), case, NullTracker())
        except MicroBatchMemoryError:
            fits = False
        return [fits, torch.cuda.memory_stats()["num_alloc_retries"], real_peaks(), requests() if total_mib > 100_000 else []]

    _, _, (allocated, reserved), trace = card.in_child(lambda: work(200_000))
    found, model = [], []
    for share in (0.9, 0.7, 0.5, 0.3, 0.1):
        limit_mib = int(allocated + share * (reserved - allocated))
        fits, flushes, _, _ = card.in_child(lambda limit_mib=limit_mib: work(limit_mib + CONTEXT_MIB))
        found.append([fits, flushes])
        served = replay(trace, expandable_segments=expandable, limit_bytes=limit_mib * MIB)
        model.append([served.fits, served.cache_flushes])
    print(found, model)
    assert model == found


def reserved_by_pool():
    """MiB that the pools for requests of more and of at most 1 MiB hold, and the most that the small ones took at once."""
    stats = torch.cuda.memory_stats()
    names = ("reserved_bytes.large_pool.current", "reserved_bytes.small_pool.current", "allocated_bytes.small_pool.peak")
    return [stats[name] / MIB for name in names]


@pytest.mark.parametrize("expandable", [True, False])
@pytest.mark.slow
def test_two_hundred_steps_of_varying_lengths_fragment_nothing(expandable):
    """After the heaviest step the large pool never grows, and the small one only to what a shorter step's requests take.

    Activations of short micro-batches (of up to 170 tokens here) belong to the small pool: no length needs the most of both.
    """
    draw = random.Random(0)
    lengths = [[1000] * 4, *([draw.randint(30, 1000) for _ in range(draw.randint(1, 4))] for _ in range(199))]

    def work():
        start(expandable)
        case = make_case(4096, layers=2)
        model = build_random(case, torch.device("cuda", 0))
        optimizer = build_optimizer("adamw_8bit", model, case.recipe.training, is_cuda=True)
        pools = []
        card.forget_census()
        for rows in lengths:
            card.tell_supervised(sum(rows) - len(rows))
            ids = [{"input_ids": [5] * length, "labels": [5] * length} for length in rows]
            batch = collate(ids, case.execution.micro_batch)
            forward_backward(model, batch, compute_dtype=torch.bfloat16, backward=torch.Tensor.backward)
            optimizer.step()
            optimizer.zero_grad()
            pools.append(reserved_by_pool())
        made = card.census()[1]
        returned = made["cudaFree"] + made["cuMemRelease"]
        return [pools, returned, real_peaks(), peaks_of(replay(requests(), expandable_segments=expandable))]

    pools, returned, real, model = card.in_child(work)
    print(
        f"MiB of the large, the small pool, most in use in the small one after 1, 50, 200 steps: {pools[0], pools[49], pools[-1]}"
    )
    assert model == real
    assert returned == 0
    assert {large for large, _, _ in pools} == {pools[0][0]}
    (_, first, _), (_, small, most_in_use) = pools[0], pools[-1]
    assert first <= small <= most_in_use + 4
    assert small - first <= 0.01 * (pools[0][0] + first)

"""Simulated steps against real ones on tiny models, allocation by allocation, and against themselves."""

from dataclasses import replace

import pytest
import torch
from memory_bench.cases import Case, longrope, mid_size
from memory_bench.truth import measure_phases, step_shape

from qlora_phi3.family import known_config
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.report import CHECKPOINTED_INPUTS
from qlora_phi3.memory.simulate import simulate

TINY = mid_size(2, 256, 512, heads=4, vocab_size=4096, bos_token_id=0, eos_token_id=0)
#: What is not counted on a CPU: the generator's state for each recomputed layer, and kilobytes that operators take inside.
INSIDE_BYTES = 150_000
#: A compute capability.
CUDA = (8, 6)
SET_UPS = (
    Case(name="checkpointing", config=TINY),
    Case(name="every second layer recomputed", config=TINY | {"num_hidden_layers": 4}, checkpoint_every=2),
    Case(name="attention is kept, fp32", config=TINY, lengths=(700, 90), compute="float32", keep_attention=True),
    Case(name="nothing recomputed, dropout", config=TINY, checkpoint_every=0, lora={"lora_dropout": 0.1}),
    Case(name="padding", config=TINY, lengths=(200, 120, 33), packing=False),
    Case(name="packing, nothing held out", config=TINY, lengths=(200, 120, 33), evaluation_lengths=()),
    Case(name="unquantized, first micro-batch", config=TINY, quantization={"load_in_4bit": False}, accumulates=False),
    Case(name="a later one as heavy", config=TINY, lengths=(192,), later_lengths=(190,), accumulates=False, lora={"r": 64}),
    Case(name="a later one of few tokens", config=TINY, lengths=(500,), later_lengths=(64,), accumulates=False),
    Case(name="grouped queries in fp32", config=TINY | {"num_key_value_heads": 1}, compute="float32"),
    Case(name="tied embeddings", config=TINY | {"tie_word_embeddings": True}),
    Case(name="head and embedding in full", config=TINY, lora={"modules_to_save": ["lm_head", "embed_tokens"]}),
    Case(name="8-bit update at the peak", config=TINY, lora={"modules_to_save": ["lm_head"]}, optim="adamw_8bit"),
    Case(name="DoRA", config=TINY, lora={"use_dora": True}),
    Case(name="rank-stabilised, one target", config=TINY, lora={"use_rslora": True, "target_modules": ["down_proj"]}),
    Case(name="a window that a row reaches", config=TINY | {"sliding_window": 64}, lengths=(150, 40)),
    Case(name="noise on the embeddings", config=TINY, training={"neftune_noise_alpha": 5.0}),
    Case(name="LoRA+, 8-bit", config=TINY, training={"loraplus_lr_ratio": 16.0}, optim="adamw_8bit"),
    Case(name="longrope's long factors", config=TINY | longrope(64, 64)),
)  # fmt: skip


def predict(case, capability=None):
    """On a GPU of this compute capability, or on a CPU."""
    model, dtype = (case.recipe, dict(case.config), case.architecture), getattr(torch, case.compute)
    return simulate(*model, case.execution, step_shape(case), compute_dtype=dtype, capability=capability).report()


@pytest.mark.parametrize("case", SET_UPS, ids=lambda case: case.name)
def test_every_phase_takes_what_it_is_predicted_to_take(case):
    case = replace(case, lengths=case.lengths if case.lengths != (512,) else (192,))
    predicted, measured = predict(case).by_phase, measure_phases(case)
    for phase in ("update", "forward", "backward", "later forward", "later backward", "save", "evaluation"):
        if phase in measured:
            assert predicted[phase] == pytest.approx(measured[phase], abs=INSIDE_BYTES), phase
    peak, real = (max(size for name, size in phases.items() if "load" not in name) for phases in (predicted, measured))
    assert 0.995 * real <= peak <= 1.03 * real


@pytest.mark.parametrize("capability", [None, CUDA])
def test_the_categories_at_the_peak_and_the_trace_add_up_to_the_peak(capability):
    memory = predict(SET_UPS[0], capability)
    assert sum(memory.by_category.values()) == memory.allocated_bytes == max(memory.by_phase.values())
    assert memory.by_phase[memory.peak_phase] == memory.allocated_bytes
    sizes, live, peak = {}, 0, 0
    for storage, num_bytes in memory.trace:
        if num_bytes:
            assert storage not in sizes
            sizes[storage] = num_bytes
            live += num_bytes
        else:
            live -= sizes.pop(storage)
        peak = max(peak, live)
    assert peak == memory.allocated_bytes


def test_a_simulation_repeats_itself():
    assert predict(SET_UPS[1]) == predict(SET_UPS[1])


def test_tied_embeddings_are_loaded_once():
    tied, untied = (
        predict(Case(name="tied", config=TINY | {"vocab_size": 32768, "tie_word_embeddings": tie}, lengths=(16,)))
        for tie in (True, False)
    )
    table = 32768 * 256 * 2
    assert table < tied.by_phase["load"] < 1.1 * table
    assert untied.by_phase["save"] - tied.by_phase["save"] == table


@pytest.mark.parametrize(
    ("every", "offloading", "tile"),
    [(1, False, 0), (1, True, 0), (0, False, 0), (1, True, 128), (0, False, 128)],
)
def test_every_phase_of_twelve_layers_is_extrapolated_exactly_from_a_few(every, offloading, tile):
    case = Case(
        name="twelve layers",
        config=TINY | {"num_hidden_layers": 12},
        lengths=(300,),
        checkpoint_every=every,
        offloading=offloading,
        mlp_tile_tokens=tile,
        optim="paged_adamw_8bit",
    )
    predictor = make_predictor(case)
    step = case.execution, replace(step_shape(case), evaluation_lengths=())
    assert predictor.estimate(*step) == predictor.simulate(*step, 12).by_phase


@pytest.mark.parametrize(
    ("layers", "more"),
    [
        (20, {}),
        (20, {"checkpoint_every": 0, "lengths": (300, 200, 37)}),
        (20, {"offloading": True, "lengths": (700,), "mlp_tile_tokens": 128}),
        (20, {"keep_attention": True, "lengths": (300, 200, 37)}),
        (20, {"keep_attention": True, "offloading": True, "lengths": (700,), "packing": False}),
        (28, {"keep_attention": True, "checkpoint_every": 2, "lora": {"lora_dropout": 0.1}}),
        (20, {"lora": {"use_dora": True, "lora_dropout": 0.1, "target_modules": ["qkv_proj", "down_proj"]}}),
        (20, {"evaluation_lengths": (), "accumulates": False, "compute": "float16", "optim": "paged_adamw_8bit"}),
        (28, {"checkpoint_every": 2, "lora": {"target_modules": ["o_proj", "gate_up_proj"]}}),
        (26, {"checkpoint_every": 13, "lora": {"target_modules": ["qkv_proj"]}}),
    ],
)
def test_the_requests_of_many_layers_follow_from_those_of_a_few(layers, more):
    case = Case(name="many layers", config=TINY | {"num_hidden_layers": layers}, **{"lengths": (300,), **more})
    predictor, step = make_predictor(case), (case.execution, step_shape(case))
    continued = predictor.simulate_all_layers(*step)
    assert all(number < layers for _, _, number, _ in predictor._simulated)
    complete = predictor.simulate(*step, layers)
    assert renumbered(continued.trace) == renumbered(complete.trace)
    assert replace(continued, trace=()) == replace(complete, trace=())


def test_layers_that_differ_are_all_simulated():
    case = Case(name="one layer", config=TINY | {"num_hidden_layers": 20}, lora={"layers_to_transform": [3]}, lengths=(64,))
    predictor = make_predictor(case)
    predictor.simulate_all_layers(case.execution, step_shape(case))
    assert [number for _, _, number, _ in predictor._simulated] == [20]


@pytest.mark.parametrize("length", [2000, 2300])
def test_the_tiles_of_the_loss_that_are_left_out_change_nothing_but_the_requests_that_they_repeat(length, monkeypatch):
    case = Case(name="loss tiles", config=TINY | {"vocab_size": 32064}, lengths=(length,), tile_mib=16)
    few = make_predictor(case).simulate(case.execution, step_shape(case), 2)
    monkeypatch.setattr("qlora_phi3.memory.simulate.FEW_TILES", 10**6)
    complete = make_predictor(case).simulate(case.execution, step_shape(case), 2)
    assert len(few.trace) < len(complete.trace)
    assert replace(few, trace=()) == replace(complete, trace=())


def make_predictor(case):
    model = case.recipe, dict(case.config), case.architecture
    dtype = getattr(torch, case.compute)
    return Predictor(*model, compute_dtype=dtype, capability=(8, 6), multiprocessors=46)


def renumbered(trace):
    numbers = {}
    return [(numbers.setdefault(number, len(numbers)), num_bytes) for number, num_bytes in trace]


def test_offloading_moves_the_inputs_of_recomputed_layers_to_host_memory():
    case = Case(name="offloaded", config=TINY | {"num_hidden_layers": 6}, lengths=(640,), offloading=True)
    kept, moved = predict(replace(case, offloading=False), CUDA), predict(case, CUDA)
    inputs = 6 * 640 * 256 * 2
    assert kept.by_category[CHECKPOINTED_INPUTS] == inputs
    assert moved.by_category.get(CHECKPOINTED_INPUTS, 0) <= inputs // 6
    assert moved.host_bytes - kept.host_bytes == 6 * 2**19  # each is 320 KiB, and pinned in powers of two


@pytest.mark.parametrize("lengths", [(640,), (300, 200, 140)])
def test_attention_that_is_kept_takes_its_output_and_a_number_for_each_head_and_token(lengths):
    """Where the layers' inputs are: on the GPU (one layer less, as the one that is recomputed has it anyway), or on the host."""
    case = Case(name="kept", config=TINY | {"num_hidden_layers": 6}, lengths=lengths)
    output, log_sums = 640 * 256 * 2, 640 * 4 * TINY["num_attention_heads"]
    plain, kept = (predict(replace(case, keep_attention=keep), CUDA) for keep in (False, True))
    states = 3 * 512 if len(lengths) > 1 else 0  # of the random numbers that the kernel for packs does not draw
    more = kept.by_phase["backward"] - plain.by_phase["backward"]
    assert 5 * (output + log_sums) <= more <= 5 * (output + log_sums + states)
    plain, kept = (predict(replace(case, keep_attention=keep, offloading=True), CUDA) for keep in (False, True))
    assert kept.by_phase["backward"] - plain.by_phase["backward"] <= 6 * states
    assert kept.host_bytes - plain.host_bytes == 6 * sum(1 << (size - 1).bit_length() for size in (output, log_sums))


def test_an_mlp_in_tiles_holds_its_widest_tensors_for_one_tile_at_a_time():
    case = Case(name="whole", config=TINY | {"intermediate_size": 4096}, lengths=(2048,), offloading=True)
    whole, tiled = predict(case, CUDA), predict(replace(case, mlp_tile_tokens=512), CUDA)
    inner_bytes = 5 * 4096 * 2  # a token: gate and up, the gradient of their product, silu(gate), and a buffer, in 16 bit
    saved = whole.by_phase["backward"] - tiled.by_phase["backward"]
    assert 0.9 * 1536 * inner_bytes < saved < 1.2 * 1536 * inner_bytes
    assert whole.by_phase["forward"] >= tiled.by_phase["forward"]  # the loss holds more than a layer does
    assert whole.by_phase["evaluation"] > tiled.by_phase["evaluation"]


#: Two layers of a model, tokens of a row -> MiB allocated at most in a first step by torch 2.14.1's CUDA code and
#: bitsandbytes 0.50.2 on an emulated card, which hands out addresses and computes nothing.
EMULATED = [
    ("Phi-3-mini-128k-instruct", (8, 6), {}, 1, "sdpa", 512, 663.3),
    ("Phi-3-mini-128k-instruct", (8, 6), {"lora_dropout": 0.05}, 1, "sdpa", 2048, 841.7),
    ("Phi-3-mini-128k-instruct", (8, 6), {"use_dora": True}, 0, "sdpa", 2048, 1150.5),
    ("Phi-3-mini-128k-instruct", (8, 6), {}, 1, "eager", 1024, 1085.3),
    ("Phi-4-mini-instruct", (7, 5), {"use_dora": True, "lora_dropout": 0.05}, 0, "sdpa", 512, 4316.5),
]


@pytest.mark.parametrize(("model", "capability", "lora", "every", "attention", "tokens", "measured_mib"), EMULATED)
def test_cuda_allocates_what_is_predicted(model, capability, lora, every, attention, tokens, measured_mib):
    """PEFT asks for CUDA's autocast without saying so, and CUDA's softmax multiplies before its backward pass."""
    case = Case(
        name="two layers",
        config={**known_config(f"microsoft/{model}"), "num_hidden_layers": 2},
        lengths=(tokens,),
        lora=lora,
        checkpoint_every=every,
        attention=attention,
        compute="bfloat16" if capability >= (8, 0) else "float16",
        optim="paged_adamw_8bit",
    )
    above = predict(case, capability).allocated_bytes / 2**20 - measured_mib
    second_workspace = 8.125  # of cuBLAS: in a first step only from the backward pass on, afterwards always
    assert min(abs(above), abs(above - second_workspace)) < 0.2


def test_paged_state_is_in_none_of_the_allocator_figures():
    lora = {"r": 256}  # matrices of over 100,000 elements, which bitsandbytes pages
    config = mid_size(2, 512, 1024, heads=4, vocab_size=2048)
    plain = predict(Case(name="plain", config=config, lora=lora, optim="adamw_8bit"), CUDA)
    paged = predict(Case(name="paged", config=config, lora=lora, optim="paged_adamw_8bit"), CUDA)
    assert plain.paged_bytes == 0
    assert plain.resident_bytes - paged.resident_bytes == paged.paged_bytes > 0

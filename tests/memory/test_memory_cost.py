"""The steps and evaluations of a run, counted by hand and by running it; the time of a step, worked out by hand."""

from dataclasses import replace

import pytest
from workshop import read_lines

from qlora_phi3.memory.cost import (
    ARITHMETIC_SHARE,
    BANDWIDTH_SHARE,
    FLUSH_SECONDS,
    FULL_RATE_ARITHMETIC_SHARE,
    HOST_SECONDS,
    LAUNCH_SECONDS,
    Kernel,
    StepKernels,
    StepWorkload,
    count_steps,
    describe_step,
    estimate_step,
    gpu_limits,
)
from qlora_phi3.recipe.schema import Training


@pytest.mark.parametrize(("keys", "first_step", "counted"), [
    # 101 rows are 13 steps of 8 rows; 0.2 of 26 steps is 5.2, so every 6th: before, after 6, 12, 18, 24 and 26
    ({"num_train_epochs": 2}, 0, (26, 2.0, 6)),
    ({"num_train_epochs": 2}, 18, (26, 2.0, 2)),
    ({"num_train_epochs": 2, "eval_strategy": "epoch"}, 0, (26, 2.0, 3)),
    ({"num_train_epochs": 1.5, "eval_strategy": "epoch"}, 0, (20, 20 / 13, 3)),
    ({"max_steps": 5, "eval_steps": 2}, 0, (5, 5 / 13, 4)),
    ({"eval_strategy": "no"}, 0, (13, 1.0, 2)),
    # the best weights are not evaluated once more
    ({"max_steps": 4, "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}, 0, (4, 4 / 13, 3)),
])  # fmt: skip
def test_the_steps_and_the_evaluations_of_a_run_are_those_counted_by_hand(keys, first_step, counted):
    training = Training(batch_size=8, **keys)
    assert count_steps(training, 101, evaluates=True, first_step=first_step) == pytest.approx(counted)
    assert count_steps(training, 101, evaluates=False, first_step=first_step)[2] == 0


@pytest.mark.parametrize("keys", [{"eval_strategy": "epoch", "num_train_epochs": 1.5}, {"eval_steps": 0.3}])
def test_a_run_has_as_many_steps_and_evaluations_as_are_counted(shop, keys):
    shop.write(training={"batch_size": 8, "max_length": 64, "save_steps": 0.5, **keys})
    assert shop.run().exit_code == 0
    kinds = [record["kind"] for record in read_lines(shop.runs()[0] / "metrics.jsonl")]
    steps, _, evaluations = count_steps(Training(batch_size=8, **keys), 40, evaluates=True)
    assert (kinds.count("train"), kinds.count("eval")) == (steps, evaluations)


GPU = gpu_limits(tflops_16bit=10.0, bandwidth_bytes_per_second=100e9, multiprocessors=10)
RATE, BANDWIDTH = 10e12 * ARITHMETIC_SHARE, 100e9
#: Of 1,000 tokens: bound by arithmetic, and by memory; a weight of which each micro-batch dequantizes all.
PRODUCT, NORM = Kernel("matmul", 1e12, 10**6, 10**6), Kernel("elementwise", 0, 10**9, 0)
DEQUANTIZATION, SCORES = Kernel("dequantize", 0, 0, 10**9), Kernel("attention", 1e12, 10**6, 0)


def step_kernels(**fields):
    nothing = {"forward": {}, "backward": {}, "update": {}, "layers": {}}
    return StepKernels(**nothing | {"num_layers": 2, "kept_bytes": 0, "tokens": 1000, "squares": 10**6} | fields)


def workload(tokens, squares=0, num_micro_batches=1):
    return StepWorkload(lengths=(), tokens=tokens, squares=squares, num_micro_batches=num_micro_batches)


def test_a_kernel_takes_as_long_as_its_bytes_or_its_operations_and_its_launch():
    step = step_kernels(forward={PRODUCT: 3, NORM: 2})
    seconds = estimate_step(step, workload(1000), GPU)
    assert seconds.matmul == pytest.approx(3 * 1e12 / RATE)
    assert seconds.elementwise == pytest.approx(2 * 1e9 / (BANDWIDTH * BANDWIDTH_SHARE["elementwise"]))
    assert seconds.launch == pytest.approx(5 * LAUNCH_SECONDS)
    assert seconds.total == pytest.approx(seconds.matmul + seconds.elementwise + seconds.launch)


def test_products_grow_with_the_tokens_attention_with_their_squares_and_dequantization_with_the_micro_batches():
    step = step_kernels(forward={PRODUCT: 1, SCORES: 1}, backward={DEQUANTIZATION: 1}, update={NORM: 1})
    once = estimate_step(step, workload(1000, 10**6), GPU)
    twice = estimate_step(step, workload(4000, 8 * 10**6, num_micro_batches=2), GPU)
    assert twice.matmul == pytest.approx(4 * once.matmul)
    assert twice.attention == pytest.approx(8 * once.attention)
    assert twice.dequantize == pytest.approx(2 * once.dequantize)
    assert twice.elementwise == once.elementwise  # of the update alone
    assert twice.launch == pytest.approx(2 * once.launch - LAUNCH_SECONDS)


def test_a_gpu_waits_for_the_host_where_kernels_are_short():
    short = Kernel("elementwise", 0, 10**3, 0)
    seconds = estimate_step(step_kernels(forward={short: 100, PRODUCT: 1}), workload(1000), GPU)
    assert seconds.launch == pytest.approx(101 * LAUNCH_SECONDS)  # the product takes longer than starting them all
    step = step_kernels(forward={short: 60}, backward={short: 40}, update={short: 7})
    seconds = estimate_step(step, workload(1000), GPU)
    assert seconds.total == pytest.approx(107 * HOST_SECONDS)
    assert seconds.launch == pytest.approx(107 * HOST_SECONDS - 100 * 10**3 / (BANDWIDTH * BANDWIDTH_SHARE["elementwise"]) * 1.07)


def test_gpus_whose_tensor_cores_sum_at_the_full_rate_reach_a_smaller_share():
    step = step_kernels(forward={PRODUCT: 1})
    full = gpu_limits(tflops_16bit=10.0, bandwidth_bytes_per_second=BANDWIDTH, multiprocessors=5)
    assert estimate_step(step, workload(1000), full).matmul == pytest.approx(1e12 / (10e12 * FULL_RATE_ARITHMETIC_SHARE))


def test_each_emptying_of_the_allocators_cache_costs_a_wait():
    step, work = step_kernels(forward={PRODUCT: 1}), workload(3000, num_micro_batches=3)
    usual, near_the_limit = (estimate_step(step, replace(work, cache_flushes=count), GPU) for count in (0, 5))
    assert near_the_limit.launch - usual.launch == pytest.approx(3 * 5 * FLUSH_SECONDS)


def test_an_evaluation_is_the_forward_pass_alone():
    step = step_kernels(forward={PRODUCT: 1}, backward={PRODUCT: 2}, update={NORM: 1})
    assert estimate_step(step, workload(5000), GPU, trains=False).total == pytest.approx(5 * 1e12 / RATE + LAUNCH_SECONDS)


def test_each_tile_of_an_mlp_dequantizes_its_weights():
    untiled = step_kernels(forward={DEQUANTIZATION: 10})
    step = step_kernels(forward={DEQUANTIZATION: 16}, mlp_tile_tokens=250, untiled=untiled)  # 2 more for each tile but the first
    once, eight = (estimate_step(each, workload(2000), GPU) for each in (untiled, step))
    assert eight.dequantize == pytest.approx(once.dequantize * (10 + 7 * 2) / 10)
    assert eight.launch == pytest.approx((10 + 7 * 2) * LAUNCH_SECONDS)


def test_few_tokens_take_as_long_as_reading_the_weights():
    product = Kernel("matmul", 1e9, 10**3, 10**9)
    few = estimate_step(step_kernels(forward={product: 1}), workload(10), GPU)
    assert few.matmul == pytest.approx((1e9 + 10) / (BANDWIDTH * BANDWIDTH_SHARE["matmul"]))


def test_the_description_of_a_step_is_counted_by_hand():
    layers = {PRODUCT: 2, NORM: 4, Kernel("offload", 0, 10**6, 0): 2}
    step = step_kernels(forward=layers, backward={SCORES: 1}, layers=layers, kept_bytes=6 * 10**6)
    work = workload(2000, 3 * 10**6)
    described = describe_step(step, work, estimate_step(step, work, GPU))
    assert described["flops"] == pytest.approx(2 * 2 * 1e12 + 3 * 1e12)
    assert described["launches_per_layer"] == 3
    assert described["elementwise_bytes_per_token_and_layer"] == 2 * 10**6
    assert described["kept_bytes_per_token_and_layer"] == 3000
    assert set(described["seconds"]) == {"matmul", "attention", "dequantize", "elementwise", "offload", "launch"}

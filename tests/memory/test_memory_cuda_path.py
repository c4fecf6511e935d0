"""What operators take inside themselves on CUDA, against sizes worked out by hand from PyTorch's sources."""

import pytest
import torch

from qlora_phi3.memory.cuda_path import (
    attention_kernel,
    context_bytes,
    efficient_backward_bytes,
    flash_backward_bytes,
    fused_rows,
    matmul_workspace_bytes,
)
from qlora_phi3.units import MIB

PHI_3_MINI = {"head_size": 96, "grouped": False}
PHI_4 = {"head_size": 128, "grouped": True}


def test_cublas_keeps_a_workspace_for_each_thread():
    assert matmul_workspace_bytes((7, 5)) == matmul_workspace_bytes((8, 9)) == 8_519_680
    assert matmul_workspace_bytes((9, 0)) == matmul_workspace_bytes((12, 0)) == 32 * MIB


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0)])
@pytest.mark.parametrize("model", [PHI_3_MINI, PHI_4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpus_from_ampere_on_take_the_flash_kernel_without_a_mask(capability, model, dtype):
    assert attention_kernel(capability, has_mask=False, dtype=dtype, **model) == "flash"


def test_a_mask_or_fp32_rules_the_flash_kernel_out():
    assert attention_kernel((8, 9), has_mask=True, **PHI_3_MINI, dtype=torch.bfloat16) == "efficient"
    assert attention_kernel((8, 9), has_mask=False, dtype=torch.float32, **PHI_3_MINI) == "efficient"


def test_turing_takes_the_memory_efficient_kernel_but_not_in_bf16_and_not_for_grouped_queries():
    assert attention_kernel((7, 5), has_mask=False, dtype=torch.float16, **PHI_3_MINI) == "efficient"
    assert attention_kernel((7, 5), has_mask=False, dtype=torch.bfloat16, **PHI_3_MINI) == "math"
    assert attention_kernel((7, 5), has_mask=False, dtype=torch.float16, **PHI_4) == "math"
    assert attention_kernel((7, 5), has_mask=False, dtype=torch.float16, **PHI_4 | {"grouped": False}) == "efficient"


def test_heads_that_the_memory_efficient_kernel_cannot_align_take_the_math_kernel():
    assert attention_kernel((7, 5), has_mask=False, head_size=20, grouped=False, dtype=torch.float16) == "math"
    assert attention_kernel((7, 5), has_mask=False, head_size=20, grouped=False, dtype=torch.float32) == "efficient"


def test_flash_accumulates_the_gradient_of_the_queries_in_fp32():
    # 2,000 tokens count as 2,048; heads of 96 stay 96; one more fp32 a row.
    expected = (32 * 2048 * 4, 32 * 2048 * 96 * 4)
    assert flash_backward_bytes((1, 32, 2000, 96), kv_heads=32) == expected


def test_flash_gives_every_query_head_its_own_key_gradient_first_where_queries_are_grouped():
    expanded = 2 * 128 * 40 * 128 * 2
    expected = (2 * 40 * 128 * 4, 2 * 40 * 128 * 128 * 4, expanded, expanded)
    assert flash_backward_bytes((2, 40, 128, 128), kv_heads=10) == expected


@pytest.mark.parametrize(
    ("capability", "head_size", "itemsize", "workspace"),
    [
        # Seen on emulated GPUs with torch 2.14.1: 32 heads, 1,000 tokens.
        ((7, 5), 64, 2, 8_396_800),
        ((7, 5), 96, 2, 16_785_408),
        ((7, 5), 96, 4, 16_793_600),
        ((8, 0), 128, 2, 16_781_312),
        ((8, 0), 128, 4, 16_785_408),
        ((8, 6), 96, 2, 16_785_408),
        ((8, 9), 128, 2, 29_376_512),
        ((8, 9), 128, 4, 16_793_600),
        ((12, 0), 64, 4, 8_396_800),
        ((12, 0), 96, 2, 29_376_512),
    ],
)
def test_the_memory_efficient_kernel_holds_gradients_in_fp32_as_seen_on_emulated_gpus(capability, head_size, itemsize, workspace):
    assert efficient_backward_bytes((1, 32, 1000, head_size), capability, itemsize) == (128_000, workspace)


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "weight", "dtype", "most"),
    [
        ((8, 6), 28, (3072, 3072), torch.bfloat16, 128),  # 48 blocks of 64 columns are more than one wave of an RTX 3060
        ((8, 9), 128, (3072, 3072), torch.bfloat16, 8),  # and less than half a wave of an RTX 4090
        ((8, 9), 36, (16384, 3072), torch.bfloat16, 256),
        ((7, 5), 22, (16384, 3072), torch.float16, 128),
        ((7, 5), 22, (16384, 3072), torch.bfloat16, 7),  # no kernel for tensor cores
        ((8, 6), 28, (3072, 3072), torch.float32, 7),
        ((8, 0), 108, (3072, 3072), torch.bfloat16, 4),  # not modelled: those that every GPU fuses
        ((8, 6), 28, (512, 512), torch.bfloat16, 4),
    ],
)
def test_bitsandbytes_needs_no_dequantized_weight_for_few_rows(capability, multiprocessors, weight, dtype, most):
    assert fused_rows(capability, multiprocessors, weight, dtype) == most


@pytest.mark.parametrize(
    ("multiprocessors", "measured_mib"),
    [(40, 143), (82, 256), (34, 107), (142, 426), (188, 555)],
)
def test_the_context_is_within_its_spread_of_every_published_measurement(multiprocessors, measured_mib):
    predicted = context_bytes(multiprocessors)
    assert abs(predicted - measured_mib * MIB) <= 64 * MIB

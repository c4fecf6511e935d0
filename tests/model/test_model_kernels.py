"""The fused kernels: in Triton's interpreter on a CPU against PyTorch, compiled for every supported GPU, and when they are used.

The interpreter runs the kernels' own code in NumPy; what a GPU makes of it, tests/gpu says.
"""

import re
import subprocess
import sys
from importlib import reload

import pytest
import torch
from test_model_layer import ADAPTERS, SHAPES, with_other_magnitudes
from tiny_model import gradients, load_tiny, random_rows, relative_difference, save_tiny_model
from torch.nn.functional import silu

from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.model import kernels
from qlora_phi3.model.phi3 import find_base, set_checkpointing, set_mlp_tiles
from qlora_phi3.recipe.schema import Lora
from qlora_phi3.step import collate, forward_backward

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qlora_phi3.model import triton_kernels  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's kernels run in its interpreter, on tensors of the CPU."""
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        reload(triton_kernels)
        yield
    reload(triton_kernels)


def turned(x, cos, sin):
    """The rotary embedding of transformers on (rows, length, heads, size)."""
    first, second = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat([-second, first], -1) * sin[:, :, None]


def draw_angles(rows, length, size):
    angles = torch.randn(rows, length, size // 2).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 48), (5, 1300), (2, 1024)])
@pytest.mark.parametrize("in_place", [True, False])
def test_swiglu_and_its_gradient_are_those_of_pytorch(interpreted, rows, size, in_place):
    leaf = (3 * torch.randn(rows, 2 * size)).requires_grad_()
    grad = torch.randn(rows, size)
    product = silu(leaf[:, :size]) * leaf[:, size:]
    product.backward(grad)
    gate_up = leaf.detach().clone()
    torch.testing.assert_close(kernels.swiglu(gate_up.view(1, rows, -1))[0], product, rtol=1e-5, atol=1e-6)
    result = gate_up if in_place else torch.empty_like(gate_up)
    kernels.swiglu_backward(grad, gate_up, result)
    torch.testing.assert_close(result, leaf.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, product, rtol=1e-5, atol=1e-6)
    assert in_place or torch.equal(gate_up, leaf)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("gate", [-1e4, -90.0, 0.0, 90.0, 1e4])
def test_swiglu_of_large_gates_is_finite(interpreted, gate):
    gate_up, grad = torch.tensor([[gate, 2.0]]), torch.ones(1, 1)
    assert kernels.swiglu(gate_up).item() == pytest.approx(max(0.0, 2 * gate), abs=1e-30)
    kernels.swiglu_backward(grad, gate_up, gate_up)
    slope = {0.0: 0.5}.get(gate, float(gate > 0))
    assert gate_up[0].tolist() == pytest.approx([2 * slope, max(0.0, gate)], abs=1e-30)


@pytest.mark.parametrize(
    ("rows", "rows_of_angles", "length", "heads", "size", "rotated"),
    [(1, 1, 5, 6, 96, 96), (2, 1, 3, 40, 128, 128), (2, 2, 3, 5, 128, 96), (3, 1, 4, 3, 20, 12)],
)
def test_the_rotation_is_that_of_transformers_and_turns_back(interpreted, rows, rows_of_angles, length, heads, size, rotated):
    """In place on the first heads of a fused projection, and from a gradient whose heads come before its tokens."""
    cos, sin = draw_angles(rows_of_angles, length, rotated)
    fused = torch.randn(rows, length, heads + 2, size)
    before, part = fused.clone(), fused[:, :, :heads, :rotated]
    kernels.rotate(part, cos, sin, part)
    torch.testing.assert_close(part, turned(before[:, :, :heads, :rotated], cos, sin), rtol=1e-5, atol=1e-6)
    assert torch.equal(fused[:, :, heads:], before[:, :, heads:])
    assert torch.equal(fused[..., rotated:], before[..., rotated:])
    grad, result = torch.randn(rows, heads, length, size).transpose(1, 2), torch.empty(rows, length, heads, rotated)
    kernels.rotate(grad[..., :rotated], cos, sin, result, inverse=True)
    torch.testing.assert_close(turned(result, cos, sin), grad[..., :rotated], rtol=1e-5, atol=1e-5)


def test_the_rotation_reads_a_gradient_of_any_strides(interpreted):
    cos, sin = draw_angles(1, 3, 8)
    result = torch.empty(1, 3, 2, 8)
    for grad in (torch.randn(1, 8, 3, 2).permute(0, 2, 3, 1), torch.ones(()).expand(1, 3, 2, 8)):
        kernels.rotate(grad, cos, -sin, result, inverse=True)
        torch.testing.assert_close(result, turned(grad, cos, sin), rtol=1e-5, atol=1e-6)


def test_in_16_bit_the_kernels_are_as_near_to_exact_as_pytorch(interpreted):
    """In fp16: Triton 3.8's interpreter cuts bf16 off where a GPU rounds."""
    exact = 2 * torch.randn(8, 2 * 700, dtype=torch.float64).half().double()
    narrow, grad = exact.half(), torch.randn(8, 700).half()
    leaf = exact.clone().requires_grad_()
    product = silu(leaf[:, :700]) * leaf[:, 700:]
    product.backward(grad.double())
    theirs = narrow.clone().requires_grad_()
    their_product = silu(theirs[:, :700]).mul(theirs[:, 700:])
    their_product.backward(grad)
    ours, our_grad = kernels.swiglu(narrow), narrow.clone()
    kernels.swiglu_backward(grad, our_grad, our_grad)
    assert relative_error(ours, product) <= relative_error(their_product, product)
    assert relative_error(our_grad, leaf.grad) <= relative_error(theirs.grad, leaf.grad)
    cos, sin = (part.half() for part in draw_angles(1, 8, 96))
    x = torch.randn(1, 8, 5, 96).half()
    result, expected = torch.empty_like(x), turned(x.double(), cos.double(), sin.double())
    kernels.rotate(x, cos, sin, result)
    assert relative_error(result, expected) <= relative_error(turned(x, cos, sin), expected)


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were started, in their order."""
    names, usual = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda name, *a, **kw: (names.append(name), usual(name, *a, **kw))[1])
    return names


def fuse(model):
    for layer in find_base(model).model.layers:
        layer.fused_kernels = True
    return model


def short_step(model, *, packing):
    """Loss and gradients of two short rows: the interpreter takes a millisecond for each program."""
    plan = MicroBatchPlan(max_tokens=100, max_rows=2, packing=packing, longrope_boundary=None)
    model.train().zero_grad()
    rows = collate(random_rows([7, 13]), plan)
    result = forward_backward(model, rows, compute_dtype=torch.float32, backward=torch.Tensor.backward)
    return float(result.loss), gradients(model)


CASES = [
    *[(shape, "plain", every, 0, True) for shape in SHAPES for every in (0, 1)],
    *[("grouped queries", adapter, every, tiles, True) for adapter in ADAPTERS for every, tiles in ((0, 0), (1, 8))],
    ("grouped queries", "plain", 0, 8, True),
    ("partial rotary", "plain", 0, 0, False),
]


@pytest.mark.parametrize(("shape", "adapter", "every", "tiles", "packing"), CASES)
def test_a_layer_with_fused_kernels_has_the_gradients_of_one_without(
    tmp_path, interpreted, launched, shape, adapter, every, tiles, packing
):
    folder = save_tiny_model(tmp_path, num_hidden_layers=2, **SHAPES[shape])
    results = []
    for change in (lambda model: model, fuse):
        model = change(with_other_magnitudes(load_tiny(folder, lora=ADAPTERS.get(adapter, Lora(r=8)))))
        set_checkpointing(model, every)
        set_mlp_tiles(model, tiles)
        torch.manual_seed(5)
        results.append(short_step(model, packing=packing))
        assert not launched or change is fuse
    (loss, expected), (other_loss, found) = results
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert relative_difference(expected, found) < 1e-5
    assert set(launched) == {"swiglu", "swiglu_backward", "rotate"}


def test_a_second_backward_pass_over_one_graph_is_refused_with_fused_kernels_too(tmp_path, interpreted):
    model = fuse(load_tiny(save_tiny_model(tmp_path)))
    loss = model(input_ids=torch.arange(3, 20)[None]).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


#: Kernel -> its arguments that are no tensors and no constants, and its constants, of Phi-3-mini.
STRIDES = [f"{tensor}_{name}" for tensor in ("source", "target") for name in ("row", "token", "head")]
SWIGLU = ([], {"size": 8192, "block": triton_kernels.BLOCK})
ROTATE = {"source_place": 1, "target_place": 1, "half": 48, "width": 64, "block": 16, "inverse": True}
COMPILED = {
    "_swiglu": SWIGLU,
    "_swiglu_backward": SWIGLU,
    "_rotate": (["length", "distance", "heads", *STRIDES], ROTATE),
}
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


def compile_for(name, capability, dtype):
    """A kernel as Triton compiles it where sizes, strides and addresses are multiples of 16."""
    function, (numbers, constants) = getattr(triton_kernels, name), COMPILED[name]
    tensors = [each for each in function.arg_names if each not in constants and each not in numbers]
    kinds = {**dict.fromkeys(tensors, f"*{dtype}"), **dict.fromkeys(numbers, "i32"), **dict.fromkeys(constants, "constexpr")}
    aligned = {(index,): [["tt.divisibility", 16]] for index, each in enumerate(function.arg_names) if each not in constants}
    source = ASTSource(fn=function, signature=kinds, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm


def registers_and_spills(ptx, capability, folder):
    """Registers of a thread and bytes that it spills, as ptxas counts them."""
    name = "ptxas_blackwell" if capability >= 100 and hasattr(triton.knobs.nvidia, "ptxas_blackwell") else "ptxas"
    (folder / "kernel.ptx").write_text(ptx, encoding="utf-8")
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    command = [getattr(triton.knobs.nvidia, name).path, "-v", f"-arch={target}", "kernel.ptx", "-o", "kernel.cubin"]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", told)[1]), sum(map(int, re.findall(r"(\d+) bytes spill", told)))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", COMPILED)
def test_every_kernel_compiles_for_every_supported_gpu(tmp_path, name, capability):
    assert (CAPABILITIES[0] // 10, CAPABILITIES[0] % 10) == kernels.LEAST_CAPABILITY
    for dtype in ("fp16",) if capability < 80 else ("fp16", "bf16", "fp32"):
        ptx = compile_for(name, capability, dtype)["ptx"]
        registers, spills = registers_and_spills(ptx, capability, tmp_path)
        print(name, capability, dtype, registers)
        assert spills == 0
        assert registers <= 64  # a multiprocessor then holds 8 programs of 128 threads, half of its threads and more
        assert set(re.findall(r"(?:ld|st)\.global\.(\S+)", ptx)) == {"v4.b32"}  # 16 bytes at once
        if dtype == "bf16":
            assert "cvt.rn.bf16x2.f32" in ptx  # rounds to nearest


@pytest.mark.parametrize("name", COMPILED)
def test_the_place_of_a_token_is_computed_in_64_bit(name):
    """131,072 tokens of Phi-3-mini have 2^31 values of gate and up."""
    code = compile_for(name, 86, "bf16")["ttir"]
    assert re.search(r"(%\w+) = tt\.get_program_id x.*\n.*arith\.extsi \1 : i32 to i64", code)


def test_on_a_cpu_and_on_old_gpus_the_kernels_are_not_used(monkeypatch):
    told = "they are for GPUs of compute capability 7.5 and newer"
    assert kernels.why_unavailable(CPU, torch.float32) == told
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert kernels.why_unavailable(GPU, torch.float16) == told


@pytest.fixture
def new_gpu(monkeypatch):
    """A GPU whose results are those of the interpreter on this CPU."""
    compare = kernels._compare
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(kernels, "_compare", lambda _, dtype: compare(CPU, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_that_compute_what_pytorch_computes_are_used(interpreted, new_gpu, dtype):
    assert kernels.why_unavailable(GPU, dtype) is None


@pytest.mark.parametrize("wrong", ["swiglu", "swiglu_backward", "rotate"])
def test_kernels_that_compute_something_else_are_not_used(interpreted, new_gpu, monkeypatch, wrong):
    usual = kernels.launch

    def launch(name, reads, writes, **settings):
        usual(name, reads, writes, **settings)
        if name == wrong:
            writes[-1][0] += 1

    monkeypatch.setattr(kernels, "launch", launch)
    assert kernels.why_unavailable(GPU, torch.bfloat16) == "their results differ from PyTorch's"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            subprocess.CalledProcessError(1, "gcc"),
            "Triton's call of the C compiler failed; it needs Python's headers (python3-dev)",
        ),
        (RuntimeError("Failed to find C compiler.\nMore"), "Triton cannot build them (Failed to find C compiler)"),
        (AssertionError("libcuda.so cannot found!"), "Triton cannot build them (libcuda.so cannot found!)"),
    ],
)
def test_kernels_that_cannot_be_built_are_not_used(new_gpu, monkeypatch, error, told):
    def fail(*_):
        raise error

    monkeypatch.setattr(kernels, "launch", fail)
    assert kernels.why_unavailable(GPU, torch.bfloat16) == told


def test_without_triton_the_kernels_are_not_used(new_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.errors", None)
    assert kernels.why_unavailable(GPU, torch.bfloat16) == "Triton is not installed"

"""The tensors of a .gguf file: names, types and bytes, a few rows at a time; for some types by llama.cpp's own quantizer."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Phi3Config

from qlora_phi3.errors import ExportError
from qlora_phi3.export.request import QUANTIZED
from qlora_phi3.family import tensor_shapes
from qlora_phi3.model.weights import TensorInfo, Weights
from qlora_phi3.reporter import Progress

#: Packages that have llama.cpp's library in their folder: the first is prebuilt, the second is built when it is installed.
PACKAGES = ("llama_cpp_py_sync", "llama_cpp")
#: Names the library itself; llama-cpp-py-sync reads it too.
LIBRARY_VARIABLE = "LLAMA_CPP_LIB"
LIBRARY_NAME = re.compile(r"libllama(\.\S+)?\.(so|dylib)|libllama\.so\.\d+|(lib)?llama\.dll")
OTHER_WAYS = f"pip install llama-cpp-py-sync, or set {LIBRARY_VARIABLE} to a libllama; three ways: qlora-phi3 docs gguf"
#: llama.cpp's quantizer writes to the terminal, ends the process where it fails, and ignores Ctrl-C: it has its own process.
#: Without files it only loads the library. Only the first two options are named: llama.cpp changed those after them in 2025 and
#: 2026, and the structure has more room than any version needs.
QUANTIZER_PROGRAM = """
import ctypes, os, sys
library, *files = sys.argv[1:]
if hasattr(os, "add_dll_directory"):
    os.add_dll_directory(os.path.dirname(library))
llama = ctypes.CDLL(library)
class Options(ctypes.Structure):
    _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("others", ctypes.c_byte * 1016)]
llama.llama_model_quantize_default_params.restype = Options
llama.llama_model_quantize.restype = ctypes.c_uint32
if files:
    llama.llama_backend_init()
    options = llama.llama_model_quantize_default_params()
    options.nthread, options.ftype = os.cpu_count() or 1, int(files[2])
    sys.exit(llama.llama_model_quantize(os.fsencode(files[0]), os.fsencode(files[1]), ctypes.byref(options)))
"""
#: The tensors of a layer, in the order of llama.cpp's own files.
LAYER_PARTS = (
    "input_layernorm", "self_attn.qkv_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_up_proj", "mlp.down_proj",
)  # fmt: skip
#: Types that hold a tensor without rounding.
LOSSLESS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """A tensor to write under a name of llama.cpp; `num_bytes` are without padding."""

    name: str
    shape: tuple[int, ...]  #: As in torch, rows first.
    type: str  #: gguf's name, `Q8_0`.
    num_bytes: int
    source: str | None = None  #: Its name in the checkpoint, or None and the values, for one that comes from the config.
    values: tuple[float, ...] = ()


def plan_tensors(config: Phi3Config, info: Mapping[str, TensorInfo], quant: str | None) -> list[TensorPlan]:
    """Every tensor of a phi3 checkpoint under llama.cpp's name; a `quant` of None keeps the type that each tensor has.
    ExportError where its tensors are not those of its config.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, config.num_hidden_layers)
    shapes = tensor_shapes(config)  # it has the sizes under the same names
    for name in sorted(info.keys() | shapes.keys()):
        found, known = info[name].shape if name in info else "none", shapes.get(name, "none")
        if found != known:
            message = f"The tensor {name} has the shape {found} in the checkpoint, and {known} by its config.json."
            raise ExportError(message, "Convert a complete export.")
    plans = [
        _plan(f"rope_factors_{kind}.weight", (len(values),), "f32", values=tuple(values))
        for kind in ("long", "short")
        if (values := config.rope_parameters.get(f"{kind}_factor"))
    ]
    layers = [f"model.layers.{number}.{part}" for number in range(config.num_hidden_layers) for part in LAYER_PARTS]
    head = [] if config.tie_word_embeddings else ["lm_head"]
    for name in (f"{module}.weight" for module in ("model.embed_tokens", *layers, "model.norm", *head)):
        type = quant or LOSSLESS.get(info[name].dtype, "f32")
        plans.append(_plan(names.get_name(name, try_suffixes=(".weight",)), shapes[name], type, source=name))
    return plans


def _plan(name: str, shape: tuple[int, ...], quant: str, **rest: Any) -> TensorPlan:
    """Choose the type of one tensor.

    Vectors stay in fp32, and rows that blocks of 32 do not fill in fp16, as in llama.cpp's converter. Embedding and head stay
    in 8 bit where the others have 4 or 5; llama.cpp's quantizer gives the head 6, in a type that the gguf package cannot write.
    """
    import gguf

    chosen = quant.upper()
    if len(shape) == 1:
        chosen = "F32"
    elif quant.startswith("q") and shape[-1] % 32:
        chosen = "F16"
    elif quant.startswith(("q4", "q5")) and name in ("token_embd.weight", "output.weight"):
        chosen = "Q8_0"
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[chosen]]
    num_bytes = torch.Size(shape).numel() // block * block_bytes
    return TensorPlan(name=name, shape=shape, type=chosen, num_bytes=num_bytes, **rest)


def encode(plan: TensorPlan, weights: Weights) -> Iterator[bytes]:
    """The bytes of a tensor, some rows at a time, in the plan's type; the checkpoint's tensors may have any float dtype.
    ExportError for a value that is not finite, or too large for fp16.
    """
    import gguf

    values = [torch.tensor(plan.values, dtype=torch.float32)]
    chunks = iter(values) if plan.source is None else weights.iter_row_chunks(plan.source)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(plan.type)
    for chunk in chunks:
        if not torch.isfinite(chunk).all():
            raise ExportError(f"{plan.source} holds NaN or infinity.", "Export the run again.")
        if dtype is None:
            yield gguf.quantize(chunk.float().numpy(), gguf.GGMLQuantizationType[plan.type]).tobytes()
            continue
        cast = chunk.to(dtype)
        if dtype is torch.float16 and not torch.isfinite(cast).all():
            largest = float(chunk.abs().max())
            raise ExportError(f"{plan.source} reaches {largest:.4g}; fp16 ends at 65,504.", "Choose bf16, f32 or q8_0.")
        yield cast.view(torch.uint8).numpy().tobytes()


def check_quant(quant: str) -> None:
    """Raise ExportError for a type whose library is not installed."""
    check_package()
    if quant in QUANTIZED:
        find_library(quant)


def check_package() -> None:
    """Raise ExportError where the gguf package is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ExportError("A .gguf file needs the gguf package.", "Install it: pip install 'qlora-phi3[gguf]'")


def find_library(quant: str) -> Path:
    """The first of llama.cpp's libraries on this computer that can be loaded: of `LIBRARY_VARIABLE`, then of `PACKAGES`.
    ExportError where there is none; `quant` is for the message.
    """
    given = os.environ.get(LIBRARY_VARIABLE)
    candidates = [Path(given).expanduser().absolute()] if given else []
    for spec in (importlib.util.find_spec(package) for package in PACKAGES):
        for folder in (spec and spec.submodule_search_locations) or ():
            candidates += [path for path in sorted(Path(folder).rglob("*llama*")) if LIBRARY_NAME.fullmatch(path.name)]
    problem = ""
    for path in candidates:
        command = [sys.executable, "-c", QUANTIZER_PROGRAM, str(path)]
        loaded = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if loaded.returncode == 0:
            return path
        problem = problem or f" {path} cannot be loaded: {(loaded.stderr.strip() or 'no message').splitlines()[-1]}."
    hint = f"Install it: {OTHER_WAYS}. Or take --quant q8_0, which the gguf package writes."
    raise ExportError(f"--quant {quant} needs llama.cpp's own quantizer.{problem}", hint)


def quantize_file(source: Path, target: Path, quant: str, progress: Progress) -> None:
    """Quantize a .gguf file of 16 or 32 bit to a type of `QUANTIZED`; only at the end is it known how many bytes that makes.
    ExportError where the quantizer failed, with its last line.
    """
    import gguf

    file_type = str(int(gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"]))
    command = [sys.executable, "-c", QUANTIZER_PROGRAM, str(find_library(quant)), str(source), str(target), file_type]
    what, code = f"Quantizing to {quant}", None
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while code is None:
                try:
                    code = process.wait(0.5)
                except subprocess.TimeoutExpired:
                    progress(what, target.stat().st_size if target.exists() else 0, None)
        finally:
            process.kill()
            process.wait()
        if code != 0:
            log.seek(0)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            last = lines[-1] if lines else f"exit code {code}"
            raise ExportError(f"llama.cpp's quantizer failed on {source}: {last}", f"Update it: {OTHER_WAYS}.")
    progress(what, target.stat().st_size, target.stat().st_size)

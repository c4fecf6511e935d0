"""A local checkpoint compared with the model that its config.json describes, by the headers of its files alone.

transformers ignores tensors that the model lacks, and fills in those that the files lack: biases, split projections and another
kind of quantization would be trained without, or not as what they are. Run and `vram-check` both compare.
"""

from dataclasses import asdict
from pathlib import Path

from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_phi3.errors import ModelError
from qlora_phi3.family import FUSED, Architecture, original_of, tensor_shapes
from qlora_phi3.files import check_no_pointer, is_dir
from qlora_phi3.model.quantized import is_stored_quantized, logical_info, read_quant_state
from qlora_phi3.model.weights import INDEX_NAME, WEIGHTS_NAME, StoredWeights, open_weights, refuse_pickles
from qlora_phi3.units import format_count

#: Ends of tensors that a checkpoint may have beyond the model's: buffers of old versions, and a second copy of a tied head.
REDUNDANT = (".rotary_emb.inv_freq", "lm_head.weight")
#: A Git LFS pointer has about 130 bytes.
POINTER_BYTES = 1024


def check_checkpoint(name: str, architecture: Architecture) -> None:
    """Check the files of a local checkpoint; a name on the hub, and a folder without weights, pass. ModelError for an adapter or
    a Git LFS pointer among the files, weights that cannot be read, or other tensors than the architecture has: missing, more, of
    another shape, or quantized in another way than config.json says.
    """
    if not is_dir(name):
        return
    folder = Path(name)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"[model] name: {name} has an adapter_config.json beside its weights; transformers would put that adapter on them.",
            "Move it away, or name the base in [model] name and that folder in [model] adapter.",
        )
    for path in folder.iterdir():
        if path.is_file() and path.stat().st_size < POINTER_BYTES:
            check_no_pointer(path, ModelError)
    if not any((folder / each).is_file() for each in (WEIGHTS_NAME, INDEX_NAME)):
        refuse_pickles(folder)
        return
    stored = open_weights(folder)
    _check_tensors(stored, name, architecture)
    _check_quantization(stored, name, architecture)


def _check_tensors(stored: StoredWeights, name: str, architecture: Architecture) -> None:
    expected, found = tensor_shapes(architecture), logical_info(stored)
    if parts := [tensor for tensor in found if tensor.split(".")[-2:-1] and tensor.split(".")[-2] in FUSED]:
        problem = "a Phi-3 whose qkv_proj and gate_up_proj are split, under model_type phi3"
        raise ModelError(f"The weights of {name} have {parts[0]}: {problem}.", _use_original(name, architecture))
    if more := sorted(tensor for tensor in found.keys() - expected.keys() if not tensor.endswith(REDUNDANT)):
        problem = f"{format_count(len(more), 'tensor')} that phi3 lacks and would ignore, first {more[0]}"
        raise ModelError(f"The weights of {name} have {problem}.", _use_original(name, architecture))
    wrong = [
        tensor
        for tensor, shape in expected.items()
        if tensor not in found or found[tensor].shape != shape or not found[tensor].dtype.is_floating_point
    ]
    if wrong:
        count = format_count(len(wrong), "tensor")
        message = f"The weights of {name} are incomplete: {count} missing or of another shape or type, first {wrong[0]}."
        raise ModelError(message, "Download the checkpoint again.")


def _use_original(name: str, architecture: Architecture) -> str:
    original = original_of(asdict(architecture), name)
    return f"Use the model that these weights belong to, or the original, such as {original}."


def _check_quantization(stored: StoredWeights, name: str, architecture: Architecture) -> None:
    kind = architecture.stored
    skip = ("lm_head",) if kind is None or kind.skip_modules is None else kind.skip_modules
    original = original_of(asdict(architecture), name)
    hint = f"Put the config.json of these weights back, or use the unquantized original, such as {original}."
    for tensor, shape in tensor_shapes(architecture).items():
        layer = tensor.removesuffix(".weight")
        says = kind is not None and len(shape) == 2 and "embed_tokens" not in layer
        says = says and should_convert_module(layer, list(skip))
        is_quantized = is_stored_quantized(stored, tensor)
        if says != is_quantized:
            told, held = ("in 4 bit", "unquantized") if says else ("unquantized", "in 4 bit")
            raise ModelError(f"The weights of {name} hold {tensor} {held}, and its config.json says {told}.", hint)
        if kind is None or not is_quantized:
            continue
        state = read_quant_state(stored, tensor)
        found = (state["quant_type"], "nested_blocksize" in state, state["blocksize"], state.get("nested_blocksize", 256))
        if found != (kind.quant_type, kind.double_quant, 64, 256):
            nested = "with" if found[1] else "without"
            held = f"{found[0].upper()} {nested} double quantization in blocks of {found[2]}"
            raise ModelError(f"The weights of {name} hold {tensor} in {held}, not in {kind.label} in blocks of 64.", hint)

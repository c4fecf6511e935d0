"""Messages about adapters: loralib's and PEFT's files, their conversion, and the start from an adapter."""

import json
from typing import Any

import torch
from message_table import Message
from safetensors.torch import save_file
from tiny_model import build_config
from workshop import Workshop

from qlora_phi3.adapters.adapter_deltas import read_deltas
from qlora_phi3.adapters.convert import change_fusion, check_target, find_base, peft_to_loralib
from qlora_phi3.adapters.delta import check_layers, fuse, read_enable, split
from qlora_phi3.adapters.loralib import Spec, build_loralib_layers, read_loralib
from qlora_phi3.adapters.peft_io import find_adapter, read_config, read_peft, read_tensors, read_weights
from qlora_phi3.adapters.start import check_start
from qlora_phi3.errors import ExportError
from qlora_phi3.family import parse_architecture, read_architecture
from qlora_phi3.recipe.schema import Lora

A, B = torch.ones(4, 8), torch.ones(6, 4)
PAIR = {"x.lora_A": A, "x.lora_B": B}
X = "base_model.model.x."
QKV = "model.layers.0.self_attn.qkv_proj"
LORA = {"peft_type": "LORA", "r": 4}


def read_state(tensors: dict[str, torch.Tensor] = PAIR, **spec: Any) -> object:
    return read_loralib(tensors, Spec(**{"alpha": {"": 16}, **spec}), "lora.pt")


def read_peft_pair(tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Any:
    tensors = {f"{X}lora_A.weight": A, f"{X}lora_B.weight": B} if tensors is None else tensors
    return read_peft(tensors, {**LORA, **config}, "here")


def read_phi3(last: str = "qkv_proj", rows: int = 256, **config: Any) -> Any:
    """An adapter of one layer of the tiny model: 256 rows of qkv_proj, 128 of q_proj."""
    place = f"base_model.model.model.layers.0.self_attn.{last}."
    magnitude = {f"{place}lora_magnitude_vector": torch.ones(rows)} if config.get("use_dora") else {}
    tensors = {f"{place}lora_A.weight": torch.ones(4, 128), f"{place}lora_B.weight": torch.ones(rows, 4), **magnitude}
    return read_peft(tensors, {**LORA, **config}, "here")


def save(shop: Workshop, content: object, name: str = "lora.pt") -> Any:
    torch.save(content, shop.path / name)
    return shop.path / name


def folder(shop: Workshop, config: object = LORA, **tensors: torch.Tensor) -> Any:
    """A PEFT directory `peft`; a tensor's name is completed."""
    place = shop.path / "peft"
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, place / "adapter_model.safetensors")
    return place


def foreign(shop: Workshop, name: str) -> Any:
    """The directory of another tool's adapter."""
    (shop.path / "peft").mkdir()
    (shop.path / "peft" / name).write_bytes(b"")
    return find_adapter(shop.path / "peft")


def pointer(shop: Workshop) -> Any:
    place = folder(shop)
    (place / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    return place


def resolve(shop: Workshop, tensors: dict[str, torch.Tensor], **config: Any) -> object:
    """`read_deltas` of an adapter on the first qkv_proj of a tiny model."""
    settings = {**LORA, "task_type": "CAUSAL_LM", "target_modules": [QKV], **config}
    architecture = parse_architecture(build_config(num_hidden_layers=1).to_dict(), "tiny")
    return read_deltas(folder(shop, settings, **tensors), architecture)


TRAINED = {f"{QKV}.lora_A.weight": torch.ones(4, 128), f"{QKV}.lora_B.weight": torch.ones(256, 4)}


def start(shop: Workshop, lora: dict[str, Any] | None = None, last: str = "qkv_proj", **config: Any) -> None:
    """Start a run on the tiny base, two layers of 128, from an adapter of rank 4 on both layers' qkv_proj or `last`."""
    shapes = {"qkv_proj": (256, 128), "q_proj": (128, 128), "embed_tokens": (128, 832)}[last]
    tensors = {}
    for number in range(2):
        layer = f"model.layers.{number}.self_attn.{last}" if last != "embed_tokens" else "model.embed_tokens"
        tensors |= {
            f"{layer}.lora_A.weight": torch.ones(4, shapes[1]),
            f"{layer}.lora_B.weight": torch.ones(shapes[0], 4),
        }
    tensors |= config.pop("tensors", {})
    place = folder(shop, {**LORA, "lora_alpha": 16, "target_modules": [last], **config}, **tensors)
    table = Lora(**{"r": 4, "target_modules": ["qkv_proj"], **(lora or {})})
    check_start(place, table, read_architecture(str(shop.base)))


def row(name: str, trigger: Any, *says: str, hint: str) -> Message:
    return Message(name=name, trigger=trigger, error=ExportError, exit_code=2, says=says, hint=hint)


MESSAGES = [
    row("loralib-alpha-unknown", lambda shop: read_state(alpha={}), "lora.pt", "of x", hint="--alpha 16"),
    row("loralib-option-names-no-layer", lambda shop: read_state(alpha={"y": 1.0}), "alpha", "'y'", hint="x"),
    row(
        "loralib-ranks-differ",
        lambda shop: read_state({**PAIR, "x.lora_B": B[:, :2]}),
        "lora_A (4, 8) and lora_B (6, 2)",
        hint="--enable x=1,0,1",
    ),
    row(
        "loralib-not-a-merged-linear",
        lambda shop: read_state(enable={"x": [True, True]}),
        "2 of 2 groups",
        hint="--enable",
    ),
    row("loralib-no-group-enabled", lambda shop: read_state(enable={"x": [False]}), "0 of 1 groups", hint="--enable"),
    row("loralib-not-a-conv2d", lambda shop: read_state(conv2d={"x": 3}), "kernel_size 3", hint="--conv2d"),
    row("loralib-half-a-pair", lambda shop: read_state({"x.lora_A": A}), "x has lora_A alone", hint="Save"),
    row("loralib-not-matrices", lambda shop: read_state({**PAIR, "x.lora_A": A[0]}), "lora_A (8,)", hint="Save"),
    row("loralib-unknown-tensor", lambda shop: read_state({**PAIR, "x.weight": B}), "'x.weight'", hint="lora_state_dict"),
    row("loralib-without-lora", lambda shop: read_state({}), "lora.pt", "'x.lora_A'", hint="directory"),
    row("no-such-file", lambda shop: read_tensors(shop.path / "bad.pt"), "bad.pt", hint="name"),
    row("pickle-with-more-than-tensors", lambda shop: read_tensors(save(shop, shop)), "lora.pt", hint="lora_state_dict"),
    row("pickle-without-state-dict", lambda shop: read_tensors(save(shop, [A])), "a list", hint="lora_state_dict"),
    row("not-a-tensor", lambda shop: read_tensors(save(shop, {"r": 16})), "'r'", "int", hint="lora_state_dict"),
    row("integers", lambda shop: read_tensors(save(shop, {"x": A.int()})), "'x'", "torch.int32", hint="Save"),
    row("nan-in-an-adapter", lambda shop: read_tensors(save(shop, {"x": A / 0 * 0})), "'x'", "NaN", hint="checkpoint"),
    row("cut-pickle", lambda shop: read_tensors(cut(save(shop, PAIR))), "lora.pt", hint="incomplete"),
    row("cut-safetensors", lambda shop: read_weights(cut(folder(shop, x=A), 20)), "adapter_model", hint="again"),
    row("no-adapter", lambda shop: find_adapter(shop.path / "nothing"), "nothing", hint="name"),
    row("adapter-is-a-file", lambda shop: find_adapter(save(shop, A)), "lora.pt is a file", hint="--to peft --alpha"),
    row("no-adapter-config", lambda shop: read_config(shop.path), "adapter_config.json", hint="directory of a PEFT"),
    row("adapter-config-is-a-list", lambda shop: read_config(folder(shop, [])), "adapter_config.json", hint="Copy"),
    row("not-a-lora", lambda shop: read_peft_pair(peft_type="LOHA"), "LOHA", hint="Only LoRA"),
    row(
        "base-changed-by-the-start",
        lambda shop: read_peft_pair(init_lora_weights="pissa"),
        "init_lora_weights = 'pissa'",
        hint="path_initial_model_for_weight_conversion",
    ),
    row("setting-not-understood", lambda shop: read_peft_pair(lora_bias=True), "lora_bias = True", hint="PEFT"),
    row("tensor-without-prefix", lambda shop: read_peft_pair({"x.lora_A.weight": A}), "'x.lora_A", hint="base_model."),
    row("peft-without-lora", lambda shop: read_peft_pair({}), "here", hint="trained LoRA"),
    row("half-a-pair", lambda shop: read_peft_pair({f"{X}lora_A.weight": A}), "x has no lora_B.weight", hint="Copy"),
    row(
        "pair-of-other-ranks",
        lambda shop: read_peft_pair({f"{X}lora_A.weight": A, f"{X}lora_B.weight": B[:, :3]}),
        "lora_A (4, 8) and lora_B (6, 3)",
        hint="Copy",
    ),
    row(
        "kernel-not-square",
        lambda shop: read_peft_pair({f"{X}lora_A.weight": torch.ones(4, 8, 1, 3), f"{X}lora_B.weight": B[..., None, None]}),
        "x has a kernel",
        hint="loralib",
    ),
    row("rank-differs-from-config", lambda shop: read_peft_pair(r=8), "r = 8", "lora_A (4, 8)", hint="adapter_config"),
    row(
        "alpha-not-positive",
        lambda shop: read_config(folder(shop, {**LORA, "lora_alpha": 0})),
        "lora_alpha = 0, which PEFT never writes",
        hint="Copy",
    ),
    row(
        "unknown-tensor",
        lambda shop: read_peft_pair({f"{X}lora_A.weight": A, f"{X}lora_B.weight": B, f"{X}something": A}),
        "'base_model.model.x.something'",
        hint="PEFT",
    ),
    row(
        "loralib-cannot-hold-a-module",
        lambda shop: build_loralib_layers(
            read_peft_pair(
                {f"{X}lora_A.weight": A, f"{X}lora_B.weight": B, "base_model.model.lm_head.weight": A},
                modules_to_save=["lm_head"],
            ),
            Spec(),
            "here",
        ),
        "'lm_head.weight'",
        hint="PEFT",
    ),
    row(
        "loralib-lacks-dora",
        lambda shop: build_loralib_layers(read_phi3(use_dora=True), Spec(), "here"),
        "qkv_proj is DoRA",
        hint="PEFT",
    ),
    row(
        "groups-not-equal",
        lambda shop: build_loralib_layers(read_phi3(), Spec(enable={"qkv_proj": [True] * 3}), "here"),
        "256 rows, not 3",
        hint="--enable",
    ),
    row(
        "trained-group-not-enabled",
        lambda shop: build_loralib_layers(read_phi3(), Spec(enable={"qkv_proj": [True, False]}), "here"),
        "group 2 of 2",
        hint="every trained group",
    ),
    row(
        "layer-not-in-base",
        lambda shop: check_layers(read_peft_pair(), {"one": (6, 8), "two": (6, 8), "three": (6, 8)}, "Net", "here"),
        "Net has no layer x",
        hint="one and three",
    ),
    row(
        "layer-of-another-size",
        lambda shop: check_layers(read_peft_pair(), {"x": (6, 9)}, "Net", "here"),
        "x is 6 x 8",
        "Net it is 6 x 9",
        hint="--base",
    ),
    row("already-fused", lambda shop: fuse(read_phi3(), tiny(shop), "here"), "qkv_proj is fused", hint="--to split"),
    row(
        "already-split",
        lambda shop: split(read_phi3("q_proj", 128), tiny(shop), "here"),
        "q_proj is split",
        hint="--to fused",
    ),
    row("nothing-to-fuse", lambda shop: fuse(read_peft_pair(), tiny(shop), "here"), "no q_proj, k_proj", hint="fits"),
    row("nothing-to-split", lambda shop: split(read_peft_pair(), tiny(shop), "here"), "no qkv_proj", hint="fits"),
    row(
        "dora-on-some-parts",
        lambda shop: fuse(read_phi3("q_proj", 128, use_dora=True), tiny(shop), "here"),
        "qkv_proj",
        "magnitude of k_proj",
        hint="q_proj and k_proj and v_proj",
    ),
    row("groups-unreadable", lambda shop: read_enable(["q,up"], lambda: tiny(shop)), "--enable q,up", hint="gate,up"),
    row(
        "loralib-target-is-safetensors",
        lambda shop: peft_to_loralib(folder(shop), shop.path / "new.safetensors", Spec()),
        "new.safetensors",
        hint=".pt",
    ),
    row(
        "base-is-unfused",
        lambda shop: change_fusion(folder(shop), shop.path / "new", fused=True, base=str(unfused(shop))),
        "unfused model",
        hint="--base",
    ),
    row("base-not-found", lambda shop: find_base(None, folder(shop)), "The base of", hint="--base"),
    row("target-without-name", lambda shop: check_target(shop.path, shop.path / "..", force=True), "..", hint="new"),
    row(
        "target-overlaps-with-source",
        lambda shop: check_target(shop.path, shop.path / "new", force=True),
        "overlaps",
        hint="place",
    ),
    row(
        "target-is-a-file",
        lambda shop: check_target(shop.path / "split", save(shop, A), force=True),
        "lora.pt is a file",
        hint="directory",
    ),
    row(
        "target-is-a-directory",
        lambda shop: check_target(shop.path / "split", folder(shop), force=True, is_folder=False),
        "peft is a directory",
        hint=".pt",
    ),
    row(
        "target-exists",
        lambda shop: check_target(shop.path / "split", folder(shop), force=False),
        "peft",
        hint="--force",
    ),
    row(
        "delta-on-the-head",
        lambda shop: resolve(shop, {"lm_head.lora_A.weight": A, "lm_head.lora_B.weight": B}, target_modules=["lm_head"]),
        "a LoRA on lm_head",
        hint="PEFT",
    ),
    row(
        "adapter-without-a-layer-of-its-config",
        lambda shop: resolve(shop, TRAINED, target_modules=["qkv_proj", "o_proj"]),
        "first that differs is model.layers.0.self_attn.o_proj",
        hint="base that the adapter was trained on",
    ),
    row(
        "nan-in-a-trained-adapter",
        lambda shop: resolve(shop, {**TRAINED, f"{QKV}.lora_B.weight": torch.full((256, 4), torch.inf)}),
        f"{QKV}.lora_B.weight holds NaN or infinity",
        hint="learning_rate",
    ),
    row(
        "start-without-adapter",
        lambda shop: check_start(shop.path / "nowhere", Lora(), read_architecture(str(shop.base))),
        "nowhere",
        hint="name",
    ),
    row("start-from-split", lambda shop: start(shop, last="q_proj"), "q_proj", hint="--to fused"),
    row("start-of-another-rank", lambda shop: start(shop, r=8), "r = 8", "has 4", hint="r = 8, lora_alpha = 16"),
    row(
        "start-of-other-targets",
        lambda shop: start(shop, {"target_modules": "all-linear"}),
        'target_modules = ["qkv_proj"]',
        '"all-linear"',
        hint='target_modules = ["qkv_proj"]',
    ),
    row(
        "start-of-other-layers",
        lambda shop: start(shop, {"layers_to_transform": [0]}),
        "layers_to_transform = unset",
        "has [0]",
        hint="Delete layers_to_transform",
    ),
    row("start-of-another-bias", lambda shop: start(shop, bias="all"), 'bias = "all"', hint='bias = "all"'),
    row(
        "start-of-other-modules",
        lambda shop: start(shop, modules_to_save=["lm_head"]),
        'modules_to_save = ["lm_head"]',
        hint='modules_to_save = ["lm_head"]',
    ),
    row(
        "start-of-trained-tokens",
        lambda shop: start(shop, trainable_token_indices=[3, 5]),
        "trainable_token_indices = [3, 5]",
        hint="PEFT",
    ),
    row("start-with-lora-bias", lambda shop: start(shop, lora_bias=True), "lora_bias = True", hint="PEFT"),
    row(
        "start-of-a-resized-vocabulary",
        lambda shop: start(shop, tensors={"model.embed_tokens.weight": torch.ones(840, 128)}),
        "840 rows",
        "832",
        hint="resized",
    ),
    row(
        "start-with-a-copy-of-the-head",
        lambda shop: start(shop, tensors={"lm_head.weight": torch.ones(832, 128)}),
        "lm_head.weight",
        hint="save_embedding_layers=False",
    ),
    row("start-of-an-embedding", lambda shop: start(shop, last="embed_tokens"), "embed_tokens", hint="modules_to_save"),
    row(
        "start-of-another-base",
        lambda shop: start(
            shop,
            tensors={"model.layers.0.self_attn.qkv_proj.lora_B.weight": torch.ones(300, 4)},
            base_model_name_or_path="someone/else",
        ),
        "300 x 128",
        "256 x 128",
        hint="someone/else",
    ),
    row(
        "start-of-a-deeper-base",
        lambda shop: start(
            shop,
            tensors={
                "model.layers.9.self_attn.qkv_proj.lora_A.weight": torch.ones(4, 128),
                "model.layers.9.self_attn.qkv_proj.lora_B.weight": torch.ones(256, 4),
            },
        ),
        "3 layers",
        "layers.9",
        hint='target_modules = ["qkv_proj"]',
    ),
    row("adapter-of-mlx", lambda shop: foreign(shop, "adapters.safetensors"), "MLX", hint="PEFT's format"),
    row("adapter-of-litgpt", lambda shop: foreign(shop, "lit_model.pth.lora"), "litgpt", hint="PEFT's format"),
    row("adapter-of-torchtune", lambda shop: foreign(shop, "adapter_0.pt"), "torchtune", hint="PEFT's format"),
    row(
        "adapter-config-of-mlx",
        lambda shop: read_peft({}, {"fine_tune_type": "lora", "num_layers": 16}, "here"),
        "MLX",
        hint="PEFT's format",
    ),
    row(
        "adapter-config-of-a-wrong-type",
        lambda shop: read_config(folder(shop, {**LORA, "target_modules": 5})),
        "target_modules = 5",
        hint="Copy",
    ),
    row(
        "adapter-is-a-git-lfs-pointer",
        lambda shop: read_weights(pointer(shop)),
        "adapter_model.safetensors is a Git LFS pointer",
        hint="git lfs pull",
    ),
]


def cut(path: Any, size: int = 300) -> Any:
    """The path of a file, or of the directory of an adapter, whose file now has the first `size` bytes only."""
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    file.write_bytes(file.read_bytes()[:size])
    return path


def tiny(shop: Workshop) -> Any:
    return read_architecture(str(shop.base))


def unfused(shop: Workshop) -> Any:
    """A copy of the tiny base that calls itself a Llama."""
    base = shop.copy_base()
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "model_type": "llama"}), encoding="utf-8")
    return base

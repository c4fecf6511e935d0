"""Checkpoints as .gguf files: read back by the gguf package, and run in llama.cpp where it is installed."""

import json
import math
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_byte_tokenizer, build_tokenizer, hub_template
from tiny_model import save_tiny_model
from tokenizers import Tokenizer

from qlora_phi3.errors import ExportError, ModelError
from qlora_phi3.export import writer
from qlora_phi3.export.gguf import write as converter
from qlora_phi3.export.gguf.prompt import (
    build_template,
    chat,
    general_name,
    plan_prompting,
    read_turns,
    write_modelfile,
)
from qlora_phi3.export.gguf.tensors import find_library, quantize_file
from qlora_phi3.export.gguf.vocab import CL100K, NEVER, O200K, read_pieces, read_vocabulary
from qlora_phi3.export.gguf.write import convert_to_gguf
from qlora_phi3.export.run import GgufResult
from qlora_phi3.model import weights

gguf = pytest.importorskip("gguf", reason="the .gguf tests need: pip install 'qlora-phi3[gguf]'")

ROWS = 832
LONGROPE = {
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1 + 0.1 * number for number in range(12)],
        "long_factor": [1 + 0.7 * number for number in range(12)],
    },
    "tie_word_embeddings": True,
    "num_key_value_heads": 1,
}
KINDS = {"plain": {}, "window": {"sliding_window": 64}, "longrope": LONGROPE}


def build_checkpoint(folder, tokenizer=None, **changes):
    save_tiny_model(folder, vocab_size=ROWS, **changes)
    (tokenizer or build_tokenizer(hub_template("Phi-3-mini-4k-instruct"))).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [453, 456]}), encoding="utf-8")
    return folder


def build_bytes(template, *, strip, regex=None):
    """A tokenizer of Phi-4's kind with two merges; `regex` cuts the text, or GPT-2's own where there is none."""
    tokenizer = build_byte_tokenizer(template, strip=strip)
    source = json.loads(tokenizer.backend_tokenizer.to_str())
    model = source["model"]
    for left, right in (("t", "h"), ("th", "e")):
        model["merges"].append([left, right])
        model["vocab"][left + right] = 300 + len(model["merges"])
    if regex:
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}
        source["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [split, {**source["pre_tokenizer"], "use_regex": False}],
        }
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(source))
    return tokenizer


def convert(folder, target, quant="f32", name="my-model", **rest) -> GgufResult:
    notes = convert_to_gguf(folder, target, quant=quant, name=name, progress=lambda *_: None, **rest)
    return GgufResult(path=target, quant=quant, notes=notes, system="")


class Reading:
    """The contents of a .gguf file."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.fields = {key: field.contents() for key, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def tensor(self, name):
        tensor = self.tensors[name]
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each kind."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: build_checkpoint(root / kind, **changes) for kind, changes in KINDS.items()}


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    """Each of them in fp32."""
    root = tmp_path_factory.mktemp("gguf")
    return {kind: convert(folder, root / f"{kind}.gguf") for kind, folder in folders.items()}


@pytest.fixture
def copy(folders, tmp_path):
    """A plain checkpoint to spoil."""
    return shutil.copytree(folders["plain"], tmp_path / "copy")


# The contents of the file


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_there_under_llama_cpps_name(kind, folders, results):
    stored, read = load_file(folders[kind] / "model.safetensors"), Reading(results[kind].path)
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
        "model.layers.1.self_attn.qkv_proj.weight": "blk.1.attn_qkv.weight",
        "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.layers.1.mlp.gate_up_proj.weight": "blk.1.ffn_up.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if kind != "longrope":
        pairs["lm_head.weight"] = "output.weight"
    for theirs, ours in pairs.items():
        torch.testing.assert_close(read.tensor(ours), stored[theirs], rtol=0, atol=0)
    factors = {"rope_factors_long.weight", "rope_factors_short.weight"} if kind == "longrope" else set()
    second_layer = {name.replace("blk.1.", "blk.0.") for name in pairs.values()}
    assert read.tensors.keys() == {*pairs.values(), *second_layer, *factors}


def test_the_architecture_is_written_in_llama_cpps_keys(results):
    fields = Reading(results["longrope"].path).fields
    assert fields["general.architecture"] == "phi3"
    expected = {
        "context_length": 2048,
        "embedding_length": 128,
        "feed_forward_length": 256,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "rope.dimension_count": 24,
        "rope.freq_base": 10000.0,
        "rope.scaling.original_context_length": 256,
        "attention.sliding_window": 0,
    }
    assert {key: fields[f"phi3.{key}"] for key in expected} == expected
    assert fields["phi3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1 + math.log(8) / math.log(256)))
    factors = Reading(results["longrope"].path).tensor("rope_factors_long.weight")
    assert factors.tolist() == pytest.approx(LONGROPE["rope_parameters"]["long_factor"])


def test_phi_4_minis_attention_factor_is_the_one_in_its_published_files(tmp_path):
    """1.190238 by the log of llama.cpp loading it, and by hand: sqrt(1 + ln 32 / ln 4096)."""
    rope = {**LONGROPE["rope_parameters"]}
    sizes = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    folder = build_checkpoint(tmp_path / "base", **{**LONGROPE, **sizes, "rope_parameters": rope})
    fields = Reading(convert(folder, tmp_path / "x.gguf").path).fields
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx(1.190238, abs=1e-6)


def test_the_vocabulary_the_special_tokens_and_the_template_are_written(folders, results):
    fields = Reading(results["plain"].path).fields
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(fields["tokenizer.ggml.scores"]) == ROWS
    assert fields["tokenizer.ggml.model"] == "llama"
    named = {key: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for key in ("bos", "eos", "eot", "unknown", "padding")}
    assert named == {
        "bos": "<s>",
        "eos": "<|endoftext|>",
        "eot": "<|end|>",
        "unknown": "<unk>",
        "padding": "<|endoftext|>",
    }
    kinds = {"<0x0A>": 6, "▁th": 1, "<|end|>": 3, "[PAD831]": 5}
    assert {token: types[tokens.index(token)] for token in kinds} == kinds
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.chat_template"] == hub_template("Phi-3-mini-4k-instruct")


def test_a_template_that_writes_the_begin_of_text_token_turns_add_bos_on(tmp_path):
    tokenizer = build_tokenizer(hub_template("Phi-3-mini-4k-instruct.april-2024"))
    assert plan_prompting(tokenizer, "x").add_bos


# Types of numbers


@pytest.mark.parametrize(
    ("quant", "largest_error"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127), ("q5_1", 0.07), ("q4_0", 0.15)]
)
def test_each_type_is_as_near_as_its_bits_allow(quant, largest_error, folders, tmp_path):
    stored = load_file(folders["plain"] / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    read = Reading(convert(folders["plain"], tmp_path / "x.gguf", quant).path)
    difference = (read.tensor("blk.0.ffn_down.weight") - stored).abs().max() / stored.abs().max()
    assert 0 < difference <= largest_error
    assert read.tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    head = "Q8_0" if quant.startswith("q") else quant.upper()
    assert read.tensors["token_embd.weight"].tensor_type.name == read.tensors["output.weight"].tensor_type.name == head


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_small_pieces_give_the_same_file(quant, folders, tmp_path, monkeypatch):
    single = convert(folders["plain"], tmp_path / "single.gguf", quant)
    monkeypatch.setattr(weights, "ROW_CHUNK_BYTES", 1)
    calls = []
    pieces = tmp_path / "pieces.gguf"
    convert_to_gguf(folders["plain"], pieces, quant=quant, name="my-model", progress=lambda *call: calls.append(call))
    assert pieces.read_bytes() == single.path.read_bytes()
    assert len(calls) > 2 * len(Reading(pieces).tensors)
    assert calls[-1][1] == calls[-1][2]
    assert {what for what, *_ in calls} == {"Writing the .gguf file"}


def test_before_llama_cpps_quantizer_every_tensor_is_in_its_own_type(copy, tmp_path, monkeypatch):
    """As an export has them: merged tensors in fp16, the others in the base's bf16."""
    rewrite(copy, halve)
    first = tmp_path / "first.gguf"

    def quantize(source, target, quant, progress):
        shutil.copyfile(source, first)
        shutil.copyfile(source, target)

    monkeypatch.setattr(converter, "quantize_file", quantize)
    convert(copy, tmp_path / "x.gguf", "q4_k_m")
    stored, read = load_file(copy / "model.safetensors"), Reading(first)
    types = {name: tensor.tensor_type.name for name, tensor in read.tensors.items()}
    assert (types["blk.0.ffn_down.weight"], types["token_embd.weight"], types["output_norm.weight"]) == (
        "F16",
        "BF16",
        "F32",
    )
    for theirs, ours in (("model.layers.0.mlp.down_proj", "blk.0.ffn_down"), ("model.embed_tokens", "token_embd")):
        assert torch.equal(read.tensor(f"{ours}.weight"), stored[f"{theirs}.weight"].float())
    assert first.stat().st_size < 1.2 * sum(tensor.nbytes for tensor in stored.values())


def halve(stored):
    for name, tensor in stored.items():
        stored[name] = tensor.half() if "_proj" in name else tensor.bfloat16()


def test_the_disk_space_for_a_k_quant_is_that_of_both_files(folders):
    def needed(quant):
        info = weights.open_weights(folders["plain"]).info
        return converter.plan_gguf(folders["plain"], info, quant=quant, name="x").num_bytes

    count = sum(tensor.numel() for tensor in load_file(folders["plain"] / "model.safetensors").values())
    assert needed("q6_k") - needed("f32") == pytest.approx(6.56 / 8 * count, rel=1e-3)
    assert needed("f32") - needed("f16") == pytest.approx(2 * count, rel=0.01)


def test_rows_that_no_blocks_fill_stay_in_16_bit(tmp_path):
    folder = build_checkpoint(tmp_path / "base", intermediate_size=208)
    read = Reading(convert(folder, tmp_path / "x.gguf", "q8_0").path)
    assert read.tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert read.tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


# Vocabularies


def spoil(tokenizer, change):
    source = json.loads(tokenizer.backend_tokenizer.to_str())
    change(source)
    return source


def test_scores_put_the_merges_in_the_order_of_tokenizer_json(tmp_path):
    source = json.loads(build_tokenizer(None).backend_tokenizer.to_str())
    pieces = read_pieces(tmp_path, source)
    vocabulary, merges = source["model"]["vocab"], [tuple(pair) for pair in source["model"]["merges"]]
    scores = [pieces[vocabulary["".join(pair)]][1] for pair in merges]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    assert pieces[vocabulary["▁th"]][1] == -float(merges.index(("▁t", "h")))


def test_a_tokenizer_json_that_does_not_join_two_neighbours_which_llama_cpp_joins_is_refused(tmp_path):
    def add_unmerged(source):
        source["model"]["vocab"]["qz"] = 700

    with pytest.raises(ExportError, match="'q' and 'z'"):
        read_pieces(tmp_path, spoil(build_tokenizer(None), add_unmerged))


def test_a_piece_that_no_merges_make_and_no_neighbours_spell_is_never_made(tmp_path):
    def add_unreachable(source):
        source["model"]["vocab"]["qzx"] = 700

    assert read_pieces(tmp_path, spoil(build_tokenizer(None), add_unreachable))[700] == ("qzx", NEVER, 1)


def test_another_normalizer_is_refused(tmp_path):
    def metaspace(source):
        source["normalizer"] = None
        source["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}

    with pytest.raises(ExportError, match="Metaspace"):
        read_pieces(tmp_path, spoil(build_tokenizer(None), metaspace))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a small sentencepiece model, and the tokenizer.json that belongs to it."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    folder = tmp_path_factory.mktemp("sentencepiece")
    words = Path(converter.__file__).read_text(encoding="utf-8").split("\n")
    with (folder / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(words),
            model_writer=file,
            model_type="bpe",
            vocab_size=450,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    scores = {model.id_to_piece(number): model.get_score(number) for number in range(model.vocab_size())}
    pairs = [(word[:cut], word[cut:]) for word in scores for cut in range(1, len(word))]
    merges = sorted((pair for pair in pairs if all(part in scores for part in pair)), key=lambda p: -scores["".join(p)])
    source = json.loads(build_tokenizer(None).backend_tokenizer.to_str())
    source["model"]["vocab"] = {piece: number for number, piece in enumerate(scores)}
    source["model"]["merges"] = [list(pair) for pair in merges]
    source["added_tokens"] = []
    return folder, source


def test_tokenizer_model_and_tokenizer_json_merge_in_the_same_order(trained, tmp_path):
    folder, source = trained
    by_model, by_json = read_pieces(folder, source), read_pieces(tmp_path, source)
    assert len(by_model) == 450
    for pieces in (by_model, by_json):
        assert {number: text for number, (text, _, _) in pieces.items()} == {
            number: text for text, number in source["model"]["vocab"].items()
        }
    merged = [number for number, (text, _, kind) in by_model.items() if kind == 1 and len(text) > 1]
    assert len(merged) > 50
    order = [sorted(merged, key=lambda number: -pieces[number][1]) for pieces in (by_model, by_json)]
    assert order[0] == order[1]


def test_a_tokenizer_model_of_other_ids_is_refused(trained):
    folder, source = trained
    shifted = {**source, "model": {**source["model"], "vocab": {"th": 300}}}
    with pytest.raises(ExportError, match="id 300"):
        read_pieces(folder, shifted)


@pytest.mark.parametrize(("regex", "name"), [(CL100K, "dbrx"), (O200K, "gpt-4o"), (None, "gpt-2")])
def test_each_way_of_splitting_text_has_llama_cpps_name(regex, name, tmp_path):
    vocabulary = read_vocabulary(tmp_path, build_bytes(hub_template("phi-4"), strip=True, regex=regex), ROWS)
    assert (vocabulary.model, vocabulary.pre, vocabulary.scores) == ("gpt2", name, None)
    assert len(vocabulary.tokens) == ROWS


def test_a_way_of_splitting_text_without_a_name_is_refused(tmp_path):
    with pytest.raises(ExportError, match="pre_tokenizer"):
        read_vocabulary(tmp_path, build_bytes(hub_template("phi-4"), strip=True, regex=r"\w+"), ROWS)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_the_special_tokens_that_gguf_reads_from_the_files_are_the_loaded_tokenizers(kind, tmp_path):
    template = hub_template("phi-4")
    tokenizer = build_bytes(template, strip=True) if kind == "bytes" else build_tokenizer(template)
    fields = Reading(convert(build_checkpoint(tmp_path / "base", tokenizer), tmp_path / "x.gguf").path).fields
    for key, number in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        assert fields.get(f"tokenizer.ggml.{key}_token_id") == number
    assert fields.get("tokenizer.ggml.merges") == (["t h", "th e"] if kind == "bytes" else None)


# Prompts


@pytest.mark.parametrize(
    ("given", "rule", "name"),
    [
        ("support-bot", True, "support-bot (Phi-3)"),
        ("My-Phi-3.5-bot", True, "My-Phi-3.5-bot"),
        ("my phi3", True, "my phi3"),
        ("support-bot", False, "support-bot"),
        ("my-PHI-3-bot", False, "my-Phi 3-bot"),
        ("phi-4-mini", False, "phi-4-mini"),
    ],
)
def test_a_name_says_phi_3_exactly_where_llama_cpps_rule_is_wanted(given, rule, name):
    assert general_name(given, rule=rule) == name


def test_a_byte_vocabulary_is_never_called_phi_3_for_llama_cpp_cannot_load_that(tmp_path):
    """Its tokens take white space along all the same, so the template is written without any."""
    prompting = plan_prompting(build_bytes(hub_template("Phi-3-mini-4k-instruct"), strip=True), "my phi-3")
    assert prompting.name == "my Phi 3"
    assert prompting.turns.user == ("<|user|>", "<|end|><|assistant|>")
    assert "\n'" not in prompting.template
    assert len(prompting.notes) == 1
    assert "begins or ends with white space" in prompting.notes[0]


FAMILY = {
    "Phi-3-mini-4k-instruct": ("", True, "<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>"),
    "Phi-3-mini-4k-instruct.april-2024": ("", False, "<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>"),
    "Phi-3-medium-4k-instruct": ("", False, "<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>"),
    "Phi-3.5-mini-instruct": ("", True, "<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>"),
    "phi-4": ("", True, "<|im_start|>user<|im_sep|>", "<|im_end|><|im_start|>assistant<|im_sep|>", "<|im_end|>"),
    "phi-4.december-2024": (
        "",
        True,
        "<|im_start|>user<|im_sep|>",
        "<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
    ),
    "Phi-4-reasoning": (
        "<|im_start|>system",
        False,
        "<|im_start|>user<|im_sep|>",
        "<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
    ),
    "Phi-4-mini-instruct": ("", True, "<|user|>", "<|end|><|assistant|>", "<|end|>"),
    "Phi-4-mini-instruct.without-eos": ("", True, "<|user|>", "<|end|><|assistant|>", "<|end|>"),
    "Phi-4-mini-reasoning": ("<|system|>Your name is Phi", True, "<|user|>", "<|end|><|assistant|>", "<|end|>"),
}


@pytest.mark.parametrize("model", FAMILY)
def test_each_models_template_is_fixed_text_around_the_words(model):
    opening, has_system, before, after, end = FAMILY[model]
    tokenizer = build_tokenizer(hub_template(model))
    turns = read_turns(tokenizer, hub_template(model))
    assert turns.opening.startswith(opening)
    assert bool(turns.opening) == bool(opening)
    assert turns.user == (before, after)
    assert turns.end_of_turn == end
    assert (turns.system is not None) == has_system
    talk = chat("user 1", "assistant 2", "user 3", "assistant 4", "user 5")
    rendered = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert turns.render(talk) == rendered.removeprefix("<s>")


def test_a_template_that_is_more_than_fixed_text_is_left_to_ollama(tmp_path):
    tokenizer = build_tokenizer(None)
    counting = "{% for m in messages %}<|user|>{{ loop.index }}{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
    assert read_turns(tokenizer, counting) is None


def test_phi_3s_modelfile(folders, tmp_path):
    assert write_modelfile(folders["plain"], tmp_path / "bot.gguf") == ("", ())
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8") == (
        "FROM ./bot.gguf\n"
        'TEMPLATE """{{- range $i, $_ := .Messages }}\n'
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
        '{{- if eq .Role `user` }}{{ "<|user|>\\n" }}{{ .Content }}{{ "<|end|>\\n<|assistant|>\\n" }}\n'
        '{{- else if eq .Role `system` }}{{ "<|system|>\\n" }}{{ .Content }}{{ "<|end|>\\n" }}\n'
        '{{- else if eq .Role `assistant` }}{{ .Content }}{{ if not $last }}{{ "<|end|>\\n" }}{{ end }}\n'
        "{{- end }}\n"
        '{{- end }}"""\n'
        'PARAMETER stop "<|endoftext|>"\n'
        'PARAMETER stop "<|end|>"\n'
        "PARAMETER num_ctx 512\n"
    )


def test_with_longrope_ollamas_context_is_what_the_short_factors_serve(folders, tmp_path):
    write_modelfile(folders["longrope"], tmp_path / "bot.gguf")
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8").endswith("PARAMETER num_ctx 256\n")


@pytest.mark.parametrize(
    ("system", "line", "note"),
    [
        ('Be "brief".\nAlways.', 'SYSTEM """Be "brief".\nAlways."""\n', "The Modelfile has the system turn of all training rows"),
        ('Write """ once.', "", "The system turn of all training rows has no place in the Modelfile"),
    ],
)
def test_the_system_turn_of_all_training_rows_is_that_of_the_modelfile(folders, tmp_path, system, line, note):
    write_modelfile(folders["plain"], tmp_path / "bot.gguf")
    without = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    placed, (said,) = write_modelfile(folders["plain"], tmp_path / "bot.gguf", system)
    assert placed == (system if line else "")
    assert said.startswith(note)
    stop = 'PARAMETER stop "<|endoftext|>"\n'
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8") == without.replace(stop, line + stop)


def test_a_template_without_a_system_turn_leaves_it_to_the_first_question(folders, tmp_path, monkeypatch):
    from qlora_phi3.export.gguf import prompt

    turns = prompt.Turns(opening="", system=None, user=("<|user|>", "<|assistant|>"), after_assistant="<|end|>")
    planned = prompt.plan_prompting
    monkeypatch.setattr(prompt, "plan_prompting", lambda *given: replace(planned(*given), turns=turns))
    _, (note,) = write_modelfile(folders["plain"], tmp_path / "bot.gguf", "Be brief.")
    assert note.endswith("begin the first question with it.")
    assert "SYSTEM" not in (tmp_path / "Modelfile").read_text(encoding="utf-8")


def test_a_templates_own_system_prompt_comes_only_where_none_is_given():
    template = hub_template("Phi-4-mini-reasoning")
    written = build_template(read_turns(build_tokenizer(template), template))
    assert "{{- if and (eq $i 0) (ne .Role `system`) }}" in written
    assert written.count("Your name is Phi") == 2


# Notes, and what is refused


def test_what_llama_cpp_does_differently_is_in_the_notes(results):
    (note,) = results["plain"].notes
    assert "begins with white space beyond ASCII, such as U+3000" in note
    assert "past 64 tokens it attends to everything" in results["window"].notes[1]
    assert "larger than 256" in results["longrope"].notes[1]


def test_a_failure_in_the_middle_leaves_nothing(copy, tmp_path):
    def stop(what, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_to_gguf(copy, tmp_path / "out" / "x.gguf", quant="f32", name="x", progress=stop)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_written(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(2**20))
    with pytest.raises(ExportError, match="1 MiB"):
        convert(folders["plain"], tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def rewrite(folder, change):
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize("value", [7e4, float("nan")])
def test_a_value_that_fp16_cannot_hold_is_an_error_that_names_its_tensor(value, copy, tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight"
    rewrite(copy, lambda stored: stored[name].view(-1)[5:6].fill_(value))
    with pytest.raises(ExportError, match=name):
        convert(copy, tmp_path / "x.gguf", "f16")
    assert list(tmp_path.glob("*.gguf*")) == []


def test_another_architecture_is_refused(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llama"}), encoding="utf-8")
    with pytest.raises(ModelError, match="llama"):
        convert(copy, tmp_path / "x.gguf")


# In llama.cpp itself


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="to run the .gguf files: pip install llama-cpp-python")


def load_llama(llama_cpp, path, n_ctx):
    """A model in llama.cpp with a cache in fp32."""
    return llama_cpp.Llama(
        str(path), n_ctx=n_ctx, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1, flash_attn=False
    )


TALKS = (
    chat("user What is the 3rd colour?"),
    chat("system be kind", "user one  two", "assistant thinner", "user\nÖl ❄"),
)


@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_llama_cpp_reads_the_same_ids_computes_the_same_logits_and_says_the_same(kind, llama_cpp, folders, results, tmp_path):
    from transformers import AutoTokenizer, Phi3ForCausalLM

    if kind == "bytes":
        folder = build_checkpoint(tmp_path / "base", build_bytes(hub_template("phi-4"), strip=False, regex=CL100K))
        path = convert(folder, tmp_path / "x.gguf").path
    else:
        folder, path = folders[kind], results[kind].path
    tokenizer, model = AutoTokenizer.from_pretrained(folder), Phi3ForCausalLM.from_pretrained(folder, dtype="float32")
    llama = load_llama(llama_cpp, path, n_ctx=256)
    for talk in TALKS:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids
        ids = ids[:60]  # less than the window, which llama.cpp does not apply
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        llama.reset()
        llama.eval(ids)
        torch.testing.assert_close(torch.from_numpy(llama.scores[: len(ids)].copy()), logits, rtol=0, atol=1e-4)
        assert llama.scores[: len(ids)].argmax(-1).tolist() == logits.argmax(-1).tolist()


def test_past_the_boundary_llama_cpp_uses_the_long_factors(llama_cpp, folders, results):
    from transformers import Phi3ForCausalLM

    ids = torch.randint(10, 400, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = Phi3ForCausalLM.from_pretrained(folders["longrope"], dtype="float32")(ids).logits[0]
    llama = load_llama(llama_cpp, results["longrope"].path, n_ctx=512)
    llama.eval(ids[0].tolist())
    torch.testing.assert_close(torch.from_numpy(llama.scores[:300].copy()), logits, rtol=0, atol=1e-4)


# llama.cpp's quantizer


@pytest.fixture
def quantizer():
    """Skips where llama.cpp's library is not installed; CI has it."""
    try:
        return find_library("q6_k")
    except ExportError as error:
        pytest.skip(f"to make K-quants: {error.hint}")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint whose rows K-quants fit: multiples of 256."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    return build_checkpoint(tmp_path_factory.mktemp("wide") / "base", **sizes)


#: Types of weights of the first layer, as llama.cpp's rules mix them, and the largest error of a weight, relative to the largest.
MIXES = {
    "q4_k_m": ({"Q4_K", "Q5_K", "Q6_K"}, 0.15),
    "q5_k_m": ({"Q5_K", "Q6_K"}, 0.08),
    "q6_k": ({"Q6_K"}, 0.04),
    "q3_k_l": ({"Q3_K", "Q5_K", "Q6_K"}, 0.3),
    "iq4_nl": ({"IQ4_NL", "Q5_K", "Q6_K"}, 0.15),
}


@pytest.mark.parametrize("quant", MIXES)
def test_every_k_quant_is_near_the_weights_that_it_was_made_of(quant, quantizer, wide, tmp_path):
    result = convert(wide, tmp_path / "x.gguf", quant)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    reading, stored = Reading(result.path), load_file(wide / "model.safetensors")
    assert reading.fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"]
    types, largest = MIXES[quant]
    matrices = [tensor for tensor in reading.tensors.values() if len(tensor.shape) == 2]
    assert {tensor.tensor_type.name for tensor in matrices} <= types
    for theirs, ours in (
        ("layers.0.mlp.down_proj", "blk.0.ffn_down"),
        ("layers.1.self_attn.qkv_proj", "blk.1.attn_qkv"),
        ("embed_tokens", "token_embd"),
    ):
        was, is_now = stored[f"model.{theirs}.weight"], reading.tensor(f"{ours}.weight")
        assert 0 < (is_now - was).abs().max() / was.abs().max() < largest, theirs


def test_the_library_of_a_package_is_found_and_one_that_cannot_be_loaded_is_passed_over(quantizer, tmp_path, monkeypatch):
    for package in ("llama_cpp_py_sync", "llama_cpp"):
        (tmp_path / package / "lib").mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "llama_cpp_py_sync" / "libllama.so").write_bytes(b"for another system")
    for path in quantizer.parent.iterdir():
        (tmp_path / "llama_cpp" / "lib" / path.name).symlink_to(path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("LLAMA_CPP_LIB", raising=False)
    assert find_library("q6_k").parent == tmp_path / "llama_cpp" / "lib"


def test_a_quantizer_that_fails_is_one_line(quantizer, tmp_path):
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ExportError, match=r"quantizer failed on .*damaged"):
        quantize_file(tmp_path / "damaged.gguf", tmp_path / "x.gguf", "q6_k", lambda *_: None)


def test_llama_cpps_quantizer_reads_a_file_of_several_types(quantizer, copy, tmp_path):
    rewrite(copy, halve)
    calls = []
    target = tmp_path / "x.gguf"
    convert_to_gguf(copy, target, quant="q6_k", name="x", progress=lambda *call: calls.append(call))
    assert calls[-1] == ("Quantizing to q6_k", target.stat().st_size, target.stat().st_size)
    stored = load_file(copy / "model.safetensors")
    for theirs, ours in (("model.layers.0.mlp.down_proj", "blk.0.ffn_down"), ("model.embed_tokens", "token_embd")):
        was, is_now = stored[f"{theirs}.weight"].float(), Reading(target).tensor(f"{ours}.weight")
        assert 0 < (is_now - was).abs().max() / was.abs().max() < 0.05

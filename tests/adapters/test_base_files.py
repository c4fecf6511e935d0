"""The copies of a base's files mean the same to every program, read by key as each of them reads."""

import json
import math
from pathlib import Path

import pytest
from jinja2 import Environment
from tiny import build_byte_tokenizer, build_tokenizer, hub_template
from transformers import AutoTokenizer, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_phi3.adapters.base_files import copy_portable, portable_config, portable_files, strip_marks
from qlora_phi3.data.template import FAMILY, TEMPLATE_DIR
from qlora_phi3.errors import ExportError

SHORT, LONG = [1 + 0.1 * number for number in range(12)], [1 + 0.7 * number for number in range(12)]
FACTORS = {"short_factor": SHORT, "long_factor": LONG}
SIZES = {
    "model_type": "phi3", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 33000, "max_position_embeddings": 2048,
}  # fmt: skip
LONGROPE = {"original_max_position_embeddings": 256, "partial_rotary_factor": 0.75}


def longrope(**more):
    return {"rope_type": "longrope", "rope_theta": 1e5, "partial_rotary_factor": 0.75, **FACTORS, **more}


CONFIGS = {
    "no rope keys": {},
    "transformers 4, theta": {"rope_theta": 1e5, "rope_scaling": None},
    "transformers 5, theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 1.0}},
    "transformers 5, part of the head": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "transformers 5, type alone": {"rope_parameters": {"type": "default", "rope_theta": 1e5}},
    "transformers 4, longrope": {**LONGROPE, "rope_theta": 1e5, "rope_scaling": {"type": "longrope", **FACTORS}},
    "the first Phi-3s, su": {**LONGROPE, "rope_theta": 1e4, "rope_scaling": {"type": "su", **FACTORS}},
    "transformers 5, longrope": {"original_max_position_embeddings": 256, "rope_parameters": longrope()},
    "the boundary inside": {"rope_parameters": longrope(original_max_position_embeddings=256)},
    "the boundary in both": {
        "original_max_position_embeddings": 512,
        "rope_parameters": longrope(original_max_position_embeddings=256),
    },
    "the usual factor, written": {"original_max_position_embeddings": 256, "rope_parameters": longrope(factor=8.0)},
    "theta outside": {**LONGROPE, "rope_theta": 1e5, "rope_parameters": {"rope_type": "longrope", **FACTORS}},
    "two thetas": {"rope_theta": 2e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    "two scalings": {
        **LONGROPE,
        "rope_theta": 1e5,
        "rope_scaling": {"type": "longrope", **FACTORS},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "grouped heads, no window": {"num_key_value_heads": None, "sliding_window": None},
    "a window, another epsilon": {
        "sliding_window": 64,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 2,
        "rope_theta": 1e5,
    },
}


def computed(theta, share, scaling, config, *, boundary, attention):
    """What a program computes with: the same dictionary from each reader."""
    return {
        "theta": theta, "rotary dimensions": int(128 // 4 * share), "boundary": scaling and boundary,
        "factors": scaling and [scaling["short_factor"], scaling["long_factor"]], "attention": attention,
        "heads": config["num_key_value_heads"], "epsilon": config["rms_norm_eps"], "window": config.get("sliding_window"),
    }  # fmt: skip


def read_transformers_5(config):
    """As the run did: transformers 5.23, through its own class."""
    model = Phi3Config(**json.loads(json.dumps(config)))
    rope = model.rope_parameters
    scaled = rope["rope_type"] == "longrope"
    attention = ROPE_INIT_FUNCTIONS["longrope"](model)[1] if scaled else 1.0
    share, boundary = rope["partial_rotary_factor"], model.original_max_position_embeddings
    return computed(rope["rope_theta"], share, rope if scaled else None, vars(model), boundary=boundary, attention=attention)


DEFAULTS_4 = {
    "rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 4096,
    "num_key_value_heads": None, "rms_norm_eps": 1e-5, "sliding_window": None,
}  # fmt: skip


def default_attention(config):
    ratio = config["max_position_embeddings"] / config["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(ratio) / math.log(config["original_max_position_embeddings"])) if ratio > 1 else 1.0


def read_transformers_4(config):
    """transformers 4.57.6: `Phi3Config.__init__` and `_rope_scaling_validation` in models/phi3/configuration_phi3.py, and
    `_compute_longrope_parameters` in modeling_rope_utils.py; `rope_parameters` is no key of it."""
    config = {**DEFAULTS_4, **config}
    config["num_key_value_heads"] = config["num_key_value_heads"] or config["num_attention_heads"]
    scaling, attention = config["rope_scaling"], 1.0
    if scaling is not None:
        if len(scaling) != 3:
            raise ValueError("`rope_scaling` must be a dictionary with three fields")
        if scaling.get("type") not in ("longrope", "su", "yarn"):
            raise ValueError("type field")
        attention = default_attention(config)
    share, boundary = config["partial_rotary_factor"], config["original_max_position_embeddings"]
    return computed(config["rope_theta"], share, scaling, config, boundary=boundary, attention=attention)


def read_vllm(config):
    """vLLM's `patch_rope_parameters` (transformers_utils/config.py) with transformers 4, and `get_rope` (rotary_embedding/): one
    table, made of `rope_scaling` if there is one and of a stored `rope_parameters` if not, with the config's own keys put in."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {"rope_type": "default"})
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None:
            rope[key] = config[key]
    kind = rope.get("rope_type", rope.get("type"))  # "su" is renamed
    assert kind in ("default", "longrope", "su")
    scaled = kind != "default"
    return computed(
        rope.get("rope_theta", 10000),
        rope.get("partial_rotary_factor", 1.0),
        rope if scaled else None,
        config,
        boundary=scaled and rope["original_max_position_embeddings"],
        attention=default_attention(config) if scaled else 1.0,
    )


def read_llama_cpp(config):
    """llama.cpp's convert_hf_to_gguf.py in 2025, `Phi3MiniModel`: `set_gguf_parameters` and `generate_extra_tensors`; it raises
    where a key is missing."""
    scaling, attention = config.get("rope_scaling"), 1.0
    if scaling is not None:
        assert scaling.get("rope_type", scaling.get("type", "")).lower() in ("su", "longrope")
        attention = default_attention(config)
    share, boundary = config.get("partial_rotary_factor", 1.0), config["original_max_position_embeddings"]
    config["rms_norm_eps"], config["num_key_value_heads"], config["max_position_embeddings"]
    return computed(config["rope_theta"], share, scaling, config, boundary=boundary, attention=attention)


def read_llama_cpp_later(config):
    """llama.cpp's converter since it reads `rope_parameters` (`TextModel.__init__` and `Phi3MiniModel`): that table, or else
    `rope_scaling`, with the config's own keys where the table lacks them; there are factors, or there is no scaling."""
    rope = dict(config.get("rope_parameters", config.get("rope_scaling")) or {})
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key not in rope and config.get(key) is not None:
            rope[key] = config[key]
    rope.setdefault("rope_type", rope.get("type"))
    scaled = bool(rope.get("long_factor"))
    boundary, share = rope["original_max_position_embeddings"], rope.get("partial_rotary_factor", 1.0)
    assert not scaled or rope["rope_type"] in ("su", "longrope")
    attention = default_attention({**config, "original_max_position_embeddings": boundary}) if scaled else 1.0
    return computed(rope["rope_theta"], share, rope if scaled else None, config, boundary=boundary, attention=attention)


READERS = (read_transformers_5, read_transformers_4, read_vllm, read_llama_cpp, read_llama_cpp_later)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_every_program_reads_the_model_that_was_trained(kind, read):
    config = {**SIZES, **CONFIGS[kind]}
    trained = dict(config)
    for name in ("rope_scaling", "rope_parameters"):
        if (trained.get(name) or {}).get("type") == "su":  # transformers 5.23 cannot read its old name
            trained[name] = {**trained[name], "type": "longrope"}
    if kind == "the boundary inside":  # transformers 5.23 ignores it, and a run moves it (`normalize_config`)
        trained["original_max_position_embeddings"] = 256
    assert read(portable_config(config, Path("config.json"))) == read_transformers_5(trained)


@pytest.mark.parametrize("kind", ["transformers 5, theta", "transformers 5, longrope"])
def test_without_the_old_form_the_others_read_another_model(kind):
    config = {**SIZES, **CONFIGS[kind]}
    assert read_transformers_4(config) != read_transformers_5(config)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_copy_of_a_copy_is_the_same(kind):
    once = portable_config({**SIZES, **CONFIGS[kind]}, Path("config.json"))
    assert portable_config(once, Path("config.json")) == once


def test_an_attention_factor_of_its_own_is_refused_by_transformers_4_and_not_lost():
    config = {**SIZES, "original_max_position_embeddings": 256, "rope_parameters": longrope(attention_factor=1.5)}
    copy = portable_config(config, Path("config.json"))
    assert read_transformers_5(copy) == read_transformers_5(config)
    assert read_transformers_5(copy)["attention"] == 1.5
    with pytest.raises(ValueError, match="three fields"):
        read_transformers_4(copy)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bfloat16", None), (None, "bfloat16"), ("bfloat16", "float16")])
def test_the_dtype_has_both_names(dtype, torch_dtype):
    """transformers before 4.56 reads torch_dtype only, transformers 5 prefers dtype."""
    given = {key: value for key, value in (("dtype", dtype), ("torch_dtype", torch_dtype)) if value}
    copy = portable_config({**SIZES, **given}, Path("config.json"))
    assert copy["dtype"] == copy["torch_dtype"] == "bfloat16"


def test_the_config_of_another_model_is_not_changed():
    config = {"model_type": "llama", "rope_parameters": {"rope_theta": 1e5}}
    assert portable_config(config, Path("config.json")) == config


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": longrope(long_factor=[1.0])},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": "longrope"},
        {"original_max_position_embeddings": 1, "rope_parameters": longrope()},
        {"original_max_position_embeddings": 0, "rope_parameters": longrope()},
        {"num_attention_heads": "four"},
    ],
)
def test_a_config_that_transformers_refuses_is_one_line(change):
    with pytest.raises(ExportError, match=r"config\.json cannot be read"):
        portable_config({**SIZES, **change}, Path("config.json"))


# Tokenizers


def write_tokenizer(folder, tokenizer, *, jinja=True, **config):
    """Files as transformers 5 writes them, with these keys of tokenizer_config.json changed; None removes one."""
    tokenizer.save_pretrained(folder, save_jinja_files=jinja)
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text(encoding="utf-8")), **config}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}), encoding="utf-8")
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture
def phi3():
    return build_tokenizer(hub_template("Phi-3-mini-4k-instruct"))


@pytest.fixture
def target(tmp_path):
    (tmp_path / "copy").mkdir()
    return tmp_path / "copy"


@pytest.mark.parametrize("written", ["TokenizersBackend", None])
@pytest.mark.parametrize("build", ["sentencepiece", "bytes"])
def test_a_tokenizer_of_transformers_5_is_written_in_words_of_transformers_4(build, written, phi3, tmp_path, target):
    """4.57.6: tokenization_utils_base.py, `_set_model_specific_special_tokens` calls .keys() of extra_special_tokens;
    models/auto/tokenization_auto.py knows no TokenizersBackend."""
    tokenizer = phi3 if build == "sentencepiece" else build_byte_tokenizer(hub_template("phi-4"), strip=True)
    source = write_tokenizer(tmp_path / "base", tokenizer, tokenizer_class=written, extra_special_tokens=["<|end|>"])
    copy_portable(source, target)
    config = read(target, "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == ["<|end|>"]
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(target)
    for text in ("<|user|>\nHello  there<|end|>\n<|assistant|>\n", " <s>x", "Öl ❄\n\tx"):
        assert after(text).input_ids == before(text).input_ids
    assert after.all_special_tokens == before.all_special_tokens
    assert after.chat_template == before.chat_template


def test_a_table_of_extra_tokens_stays(phi3, tmp_path, target):
    source = write_tokenizer(tmp_path / "base", phi3, extra_special_tokens={"image_token": "<|tool|>"})
    copy_portable(source, target)
    assert read(target, "tokenizer_config.json")["extra_special_tokens"] == {"image_token": "<|tool|>"}


def test_files_that_mean_the_same_everywhere_are_copied_byte_for_byte(phi3, tmp_path):
    keys = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}  # as Phi-3-mini has them
    source = write_tokenizer(tmp_path / "base", phi3, jinja=False, **keys)
    (source / "tokenizer.model").write_bytes(b"\x00pieces")
    files = portable_files(source)
    assert files.keys() == {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    assert all(not file.changes and file.content == (source / name).read_bytes() for name, file in files.items())


BOS, TEXT = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}


@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize("parts", [[TEXT], [BOS, TEXT], [TEXT, BOS]])
def test_a_llama_tokenizer_begins_and_ends_a_text_in_every_version_as_in_training(given, parts, phi3, tmp_path, target):
    """4.57.6, models/llama/tokenization_llama_fast.py: `update_post_processor` reads these two keys; bos is the default."""
    source = write_tokenizer(tmp_path / "base", phi3, tokenizer_class="LlamaTokenizer", add_bos_token=given)
    (source / "config.json").write_text(json.dumps({"model_type": "phi3"}), encoding="utf-8")
    content = read(source, "tokenizer.json")
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [TEXT],
        "special_tokens": special,
    }
    (source / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    copy_portable(source, target)
    config, ids = read(target, "tokenizer_config.json"), AutoTokenizer.from_pretrained(source)("Hello").input_ids
    assert AutoTokenizer.from_pretrained(target)("Hello").input_ids == ids
    assert config.get("add_bos_token", True) == (ids[0] == 1)
    assert config.get("add_eos_token", False) == (ids[-1] == 1)


@pytest.mark.parametrize("decoder", [False, True])
def test_both_files_name_the_same_end_of_text(decoder, phi3, tmp_path, target):
    """transformers reads special_tokens_map.json where there is no added_tokens_decoder; gguf never does."""
    tokens = {"added_tokens_decoder": {"32": {"content": "<|end|>", "special": True}}} if decoder else {}
    source = write_tokenizer(tmp_path / "base", phi3, eos_token="<|end|>", **tokens)
    special = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "bos_token": "<s>"}
    (source / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    copy_portable(source, target)
    config, copied = read(target, "tokenizer_config.json"), read(target, "special_tokens_map.json")
    end = "<|end|>" if decoder else "<|endoftext|>"
    assert config["eos_token"] == end
    assert copied["eos_token"] in (end, special["eos_token"] if not decoder else end)
    if not decoder:
        assert AutoTokenizer.from_pretrained(target).eos_token == AutoTokenizer.from_pretrained(source).eos_token


# Chat templates


def both_templates(folder):
    """The two places where programs look for a template."""
    path = folder / "chat_template.jinja"
    jinja = path.read_text(encoding="utf-8") if path.is_file() else None
    return jinja, read(folder, "tokenizer_config.json").get("chat_template")


def test_the_trained_template_is_in_both_places(phi3, tmp_path, target):
    for jinja in (True, False):
        source = write_tokenizer(tmp_path / f"base-{jinja}", phi3, jinja=jinja)
        copy_portable(source, target, template="{{ messages }}")
        assert both_templates(target) == ("{{ messages }}", "{{ messages }}")


def test_of_two_templates_that_differ_the_one_that_transformers_reads_is_in_both_places(phi3, tmp_path, target):
    source = write_tokenizer(tmp_path / "base", phi3, chat_template="another")
    copy_portable(source, target)
    assert both_templates(target) == (phi3.chat_template, phi3.chat_template)


def test_of_named_templates_the_default_is_kept(phi3, tmp_path, target):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages }}"}]
    source = write_tokenizer(tmp_path / "base", phi3, jinja=False, chat_template=named)
    copy_portable(source, target)
    assert both_templates(target) == (None, "{{ messages }}")


def test_a_base_without_a_template_gets_none(tmp_path, target):
    copy_portable(write_tokenizer(tmp_path / "base", build_tokenizer(None)), target)
    assert both_templates(target) == (None, None)


@pytest.mark.parametrize("place", [True, False])
def test_marks_are_removed_from_the_bases_own_template(place, phi3, tmp_path, target):
    phi3.chat_template = (TEMPLATE_DIR / "phi3.jinja").read_text(encoding="utf-8")
    copy_portable(write_tokenizer(tmp_path / "base", phi3, jinja=place), target)
    jinja, inside = both_templates(target)
    assert "generation -" not in inside
    assert jinja == (inside if place else None)


def test_a_template_that_is_not_utf_8_is_one_line(phi3, tmp_path):
    source = write_tokenizer(tmp_path / "base", phi3)
    (source / "chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(ExportError, match="not UTF-8"):
        portable_files(source)


MARKED = (
    "{% for m in messages %}\n  {%- generation -%}\n  {{ m }}\n  {%- endgeneration -%}\n{% endfor %}\n",
    "{% for m in messages %}\n  {% generation %}\n  {{ m }}\n  {% endgeneration %}\n{% endfor %}\n",
    "{% for m in messages %}a {%+ generation +%} {{ m }} {%+ endgeneration +%} b{% endfor %}",
    "{% for m in messages %}a {% generation %} {{ m }} {%endgeneration%} b\n{% endfor %}",
    "{% for m in messages %}{{ m }}\n\n{%- generation %}\n x\n{% endgeneration -%}\n y{% endfor %}",
    *((TEMPLATE_DIR / f"{name}.jinja").read_text(encoding="utf-8") for name in FAMILY),
)


@pytest.mark.parametrize("marked", MARKED)
def test_without_marks_a_template_renders_the_same_text(marked):
    """A mark takes white space with it: the template that was saved wrote other text than was trained."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    talk = [{"role": "user", "content": " one "}, {"role": "assistant", "content": " two "}]
    plain = Environment(trim_blocks=True, lstrip_blocks=True).from_string(strip_marks(marked))
    variables = {"messages": talk, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    plain.globals |= {"strftime_now": lambda form: "today", "raise_exception": None}
    assert plain.render(**variables) == _compile_jinja_template(marked).render(**variables)

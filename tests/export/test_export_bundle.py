"""The files next to the weights are the base's own, except for what must change; the model card contains nothing private."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from workshop import read_json

from qlora_phi3.errors import ExportError
from qlora_phi3.export.bundle import EndOfTurn, check_trained_with, render_card, score_label, write_companions
from qlora_phi3.recipe.load import load_recipe

DEFAULTS = {"dtype": "float16", "untied": False, "ending": EndOfTurn(7, None)}


@pytest.fixture
def places(base, tmp_path):
    """A base with every file a checkpoint of the family has, the run's adapter with its copies, and an empty target."""
    source, adapter, target = shutil.copytree(base, tmp_path / "base"), tmp_path / "adapter", tmp_path / "target"
    (source / "tokenizer.model").write_bytes(b"\x00sentencepiece")
    (source / "LICENSE").write_text("MIT", encoding="utf-8")
    shutil.copytree(source, adapter)
    target.mkdir()
    return source, adapter, target


def change(path, **keys):
    path.write_text(json.dumps({**read_json(path), **keys}), encoding="utf-8")


def test_tokenizer_and_licence_are_the_bases_own_bytes(places):
    source, _, target = places
    copied = write_companions(places[0], places[2], **DEFAULTS)["copied"]
    assert {"tokenizer.model", "tokenizer.json", "LICENSE"} <= copied.keys()
    for name in copied:
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_the_config_says_the_new_dtype_and_keeps_all_the_rest(places):
    source, _, target = places
    change(source / "config.json", torch_dtype="bfloat16", auto_map={"AutoConfig": "configuration_phi3.Phi3Config"})
    before = read_json(source / "config.json")
    changed = write_companions(places[0], places[2], **DEFAULTS)["changed"]
    after = read_json(target / "config.json")
    both_forms = {"rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 1.0}
    unchanged = {key: value for key, value in before.items() if key != "auto_map"}
    assert after == {**unchanged, **both_forms, "dtype": "float16", "torch_dtype": "float16"}
    assert {"config.json: auto_map removed", 'config.json: torch_dtype = "float16"'} <= set(changed)


def test_tied_embeddings_are_untied_where_the_head_was_trained(places):
    source, _, target = places
    change(source / "config.json", tie_word_embeddings=True)
    write_companions(places[0], places[2], **{**DEFAULTS, "untied": True})
    assert read_json(target / "config.json")["tie_word_embeddings"] is False


@pytest.mark.parametrize(("stops", "expected"), [([2, 3], [2, 3, 7]), (2, [2, 7]), ([7, 2], [7, 2]), (None, [7])], ids=str)
def test_generation_stops_at_all_it_stopped_at_and_at_the_end_of_a_turn(places, stops, expected):
    source, _, target = places
    change(source / "config.json", eos_token_id=stops)
    (source / "generation_config.json").write_text(
        json.dumps({"do_sample": False} | ({} if stops is None else {"eos_token_id": stops})), encoding="utf-8"
    )
    write_companions(places[0], places[2], **DEFAULTS)
    assert read_json(target / "generation_config.json") == {"do_sample": False, "eos_token_id": expected}


def test_a_base_without_a_generation_config_gets_one_that_stops(places):
    source, adapter, target = places
    for folder in (source, adapter):
        (folder / "generation_config.json").unlink()
    change(source / "config.json", eos_token_id=2)
    write_companions(places[0], places[2], **DEFAULTS)
    assert read_json(target / "generation_config.json") == {"eos_token_id": [2, 7]}


def test_a_tokenizer_that_was_changed_since_the_run_is_refused_by_name(places):
    source, _, _ = places
    change(source / "tokenizer_config.json", eos_token="<|end|>")
    with pytest.raises(ExportError, match=r"tokenizer_config\.json"):
        check_trained_with(*places[:2])


@pytest.mark.parametrize("name", ["tokenizer.model", "generation_config.json"])
def test_a_file_that_was_trained_with_and_that_the_base_lacks_is_not_dropped_in_silence(places, name):
    source, adapter, _ = places
    (source / name).unlink()
    with pytest.raises(ExportError) as caught:
        check_trained_with(*places[:2])
    assert str(source / name) in caught.value.message
    assert str(adapter / name) in caught.value.hint


def test_a_tokenizer_file_that_came_after_the_run_is_refused_as_what_it_is(places):
    _, adapter, _ = places
    (adapter / "tokenizer.model").unlink()
    with pytest.raises(ExportError, match=r"tokenizer\.model"):
        check_trained_with(*places[:2])


def test_a_template_of_the_recipes_own_goes_along(places):
    _, _, target = places
    write_companions(places[0], places[2], **{**DEFAULTS, "ending": EndOfTurn(7, "{{ messages }}")})
    assert (target / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"


RUN = {
    "data": {"train_rows": 600, "evaluation_rows": 195, "supervised_tokens": 12_965, "sha256": "c0ffee"},
    "steps": 75,
    "device": "x86_64 CPU",
    "eval_loss_before": 4.4098,
    "eval_loss_after": 2.4032,
}
SCORES = [
    {"name": "live", "loss": 2.3871, "mean_kl": 0.0, "max_kl": 0.0, "top_agreement": 1.0},
    {"name": "nf4", "loss": 2.3872, "mean_kl": 9e-9, "max_kl": 2e-7, "top_agreement": 1.0},
]
EXPORT = {
    "onto": "nf4",
    "dtype": "float16",
    "base": {
        "revision": "abc123",
        "quantization": {"quant_type": "nf4", "double_quant": True},
        "compared": {"differing": [], "codes_differing": [], "num_tensors": 15},
    },
    "proof": {"tokens": 2048, "rows": 21, "trained": False, "scores": SCORES},
}


def card(shop, *, train="chats.jsonl", export=EXPORT, licence="mit", **tables):
    shop.write(**{"data": {"train": train}, **tables})
    own = shop.path / "base"
    own.mkdir()
    if licence:
        (own / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A base\n", encoding="utf-8")
    text = render_card(load_recipe(shop.path / "mine.toml"), RUN, export, base=own)
    return text, ModelCard(text).data


def test_the_card_states_base_data_recipe_loss_proof_and_licence(shop):
    text, data = card(shop, model={"name": "microsoft/Phi-3-mini-4k-instruct"}, lora={"r": 32})
    assert (data.base_model, data.license, data.library_name) == (
        "microsoft/Phi-3-mini-4k-instruct",
        "mit",
        "transformers",
    )
    for words in (
        "`abc123`",
        "`c0ffee`",
        "4.4098 before, 2.4032 after",
        "r = 32",
        "The adapter is merged onto NF4 weights (float16).",
    ):
        assert words in text
    assert "| merged onto NF4 (this model) | 2.3872 | 9.0e-09 | 2.0e-07 | 100.00 % |" in text
    assert "| 4-bit base + adapter | 2.3871 |  |  |  |\n" in text


def test_the_card_distinguishes_the_loss_of_some_held_out_rows_from_that_of_all(shop):
    text, _ = card(shop)
    assert "Loss on all 195 held-out rows: 4.4098 before, 2.4032 after." in text
    assert "compared with the trained model on 2,048 tokens of 21 of the 195 held-out rows:" in text


def test_the_card_contains_no_path_of_this_computer(shop):
    text, data = card(shop, train=str(shop.path / "secret-project" / "chats.jsonl"))
    assert str(shop.path) not in text
    assert "secret-project" not in text
    assert data.base_model is None


def test_a_data_set_of_the_hub_is_linked(shop):
    assert card(shop, train="HuggingFaceH4/ultrachat_200k")[1].datasets == ["HuggingFaceH4/ultrachat_200k"]


def test_the_card_states_that_the_licence_is_unknown_and_that_there_is_no_proof(shop):
    text, data = card(shop, export={**EXPORT, "base": {"revision": None}, "proof": None}, licence=None)
    assert data.license is None
    assert "does not state it" in text
    assert "was not compared with the trained model" in text


def test_rows_that_were_trained_on_are_not_called_held_out(shop):
    proof = {**EXPORT["proof"], "trained": True}
    text, _ = card(shop, export={**EXPORT, "proof": proof})
    assert "compared with the trained model on 2,048 tokens of 21 of the 600 rows that were trained on:" in text
    assert "| | loss | mean KL" in text
    assert "held-out loss" not in text


def test_the_card_of_a_gguf_says_that_the_figures_are_of_the_merged_model(shop):
    text, data = card(shop, export={**EXPORT, "gguf": {"file": "chat-q4_0.gguf", "quant": "q4_0"}})
    assert "The merged model from which `chat-q4_0.gguf` was made as q4_0, compared with the trained model on" in text
    assert data.library_name is None
    assert "gguf" in data.tags


@pytest.mark.parametrize(
    ("quant", "dtype", "measured"),
    [
        ("f16", "float16", True),
        ("f32", "float16", True),
        ("bf16", "bfloat16", True),
        ("bf16", "float16", False),
        ("f16", "float32", False),
        ("q8_0", "float16", False),
    ],
)
def test_the_card_of_a_gguf_of_other_weights_says_that_the_file_was_not_measured(shop, quant, dtype, measured):
    export = {**EXPORT, "dtype": dtype, "gguf": {"file": "chat.gguf", "quant": quant}}
    text, _ = card(shop, export=export)
    assert ("merged onto NF4 (this model)" in text) is measured
    assert ("merged onto NF4 (from which this file was made)" in text) is not measured
    assert (f"the file itself was not measured; the table does not show what {quant} costs" in text) is not measured


def test_the_quantization_of_the_run_is_named_in_table_and_card(shop):
    """An FP4 run was published as NF4."""
    fp4 = {**EXPORT["base"], "quantization": {"quant_type": "fp4", "double_quant": True}}
    export = {**EXPORT, "base": fp4}
    text, _ = card(shop, export=export)
    assert "| merged onto FP4 (this model) |" in text
    assert "merged onto FP4 weights (float16)" in text
    assert "NF4" not in text
    names = ("live", "nf4", "original")
    assert [score_label(name, export) for name in names] == [
        "4-bit base + adapter",
        "merged onto FP4",
        "merged onto the original",
    ]
    assert score_label("live", {"base": {"quantization": None}}) == "base + adapter"

"""The model card says what it must, and nothing private."""

import pytest
from huggingface_hub import ModelCard

from qlora_phi3.export.bundle import render_card
from qlora_phi3.recipe.load import load_recipe

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
    "base": {"revision": "abc123", "compared": {"differing": []}},
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


def test_base_data_recipe_loss_proof_and_licence_are_told(shop):
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
        "The adapter is merged onto the 4-bit weights it was trained on (float16).",
    ):
        assert words in text
    assert "| merged onto NF4 (this model) | 2.3872 | 9.0e-09 | 2.0e-07 | 100.00% |" in text
    assert "| 4-bit base and adapter | 2.3871 |  |  |  |\n" in text


def test_the_loss_of_a_part_of_the_held_out_rows_is_told_from_that_of_all(shop):
    text, _ = card(shop)
    assert "Loss on all 195 held-out rows: 4.4098 before, 2.4032 after." in text
    assert "held against the trained model on 2,048 tokens of 21 of the 195 held-out rows:" in text


def test_folders_of_this_computer_are_not_told(shop):
    text, data = card(shop, train=str(shop.path / "secret-project" / "chats.jsonl"))
    assert str(shop.path) not in text
    assert "secret-project" not in text
    assert data.base_model is None


def test_a_data_set_of_the_hub_is_linked(shop):
    assert card(shop, train="HuggingFaceH4/ultrachat_200k")[1].datasets == ["HuggingFaceH4/ultrachat_200k"]


def test_an_unknown_licence_and_a_missing_proof_are_said_plainly(shop):
    text, data = card(shop, export={**EXPORT, "base": {"revision": None}, "proof": None}, licence=None)
    assert data.license is None
    assert "does not state it" in text
    assert "was not held against the trained model" in text


def test_rows_that_were_trained_on_are_not_called_held_out(shop):
    proof = {**EXPORT["proof"], "trained": True}
    text, _ = card(shop, export={**EXPORT, "proof": proof})
    assert "held against the trained model on 2,048 tokens of 21 of the 600 rows that were trained on:" in text
    assert "| | loss | mean KL" in text
    assert "held-out loss" not in text


def test_the_card_of_a_gguf_says_that_the_figures_are_of_the_merged_model(shop):
    text, data = card(shop, export={**EXPORT, "gguf": {"file": "chat-q4_0.gguf", "quant": "q4_0"}})
    assert "The merged model from which `chat-q4_0.gguf` was made as q4_0, held against the trained model on" in text
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
    assert (f"the file itself was not measured; what {quant} costs is not in the table" in text) is not measured

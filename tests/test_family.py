import pytest

from qlora_phi3.errors import ModelError
from qlora_phi3.family import known_config, nearest_known, read_architecture, read_config

MODELS = {
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-mini-128k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/Phi-3-medium-128k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-reasoning": 14_659_507_200,
    "microsoft/Phi-4-reasoning-plus": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "microsoft/Phi-4-mini-reasoning": 3_836_021_760,
}


def count_parameters(config):
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    qkv = hidden + 2 * config["num_key_value_heads"] * head
    layer = hidden * (qkv + hidden + 3 * inner + 2)  # attention, gate, up, down, and two norms
    tables = 1 if config["tie_word_embeddings"] else 2
    return config["num_hidden_layers"] * layer + tables * config["vocab_size"] * hidden + hidden


@pytest.mark.parametrize(("name", "parameters"), MODELS.items())
def test_the_shipped_shapes_have_the_models_numbers_of_parameters(name, parameters):
    assert count_parameters(known_config(name)) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_transformers_takes_the_shipped_configs(name):
    from transformers import Phi3Config

    shipped = known_config(name)
    config = Phi3Config(**shipped)
    assert config.rope_parameters["rope_type"] == ("longrope" if shipped["rope_scaling"] else "default")
    assert config.rope_parameters["rope_theta"] == shipped["rope_theta"]
    assert config.rope_parameters.get("partial_rotary_factor", 1.0) == shipped.get("partial_rotary_factor", 1.0)


@pytest.mark.parametrize(
    ("name", "positions", "boundary", "window"),
    [
        ("microsoft/Phi-3-mini-4k-instruct", 4096, None, 2047),
        ("microsoft/Phi-3-medium-4k-instruct", 4096, None, 2047),
        ("microsoft/Phi-3-mini-128k-instruct", 131_072, 4096, 262_144),
        ("microsoft/Phi-3-medium-128k-instruct", 131_072, 4096, 131_072),
        ("microsoft/Phi-3.5-mini-instruct", 131_072, 4096, 262_144),
        ("microsoft/phi-4", 16_384, None, None),
        ("microsoft/Phi-4-reasoning", 32_768, None, None),
        ("microsoft/Phi-4-mini-instruct", 131_072, 4096, 262_144),
    ],
)
def test_the_shipped_models_differ_in_how_far_they_look(name, positions, boundary, window):
    architecture = read_architecture(name, prefer_shipped=True)
    assert architecture.max_position_embeddings == positions
    assert architecture.longrope_boundary == boundary
    assert architecture.sliding_window == window


def test_longrope_has_a_factor_for_each_pair_that_is_rotated():
    assert len(known_config("microsoft/Phi-3-mini-128k-instruct")["rope_scaling"]["long_factor"]) == 96 // 2
    assert len(known_config("microsoft/Phi-3-medium-128k-instruct")["rope_scaling"]["short_factor"]) == 128 // 2
    assert len(known_config("microsoft/Phi-4-mini-instruct")["rope_scaling"]["long_factor"]) == 128 * 3 // 4 // 2


def test_a_models_name_is_known_in_any_case():
    assert known_config("MICROSOFT/phi-3-MINI-4k-instruct") == known_config("microsoft/Phi-3-mini-4k-instruct")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("microsoft/phi-4-mini", "microsoft/Phi-4-mini-instruct"),
        ("microsoft/Phi-3.5", "microsoft/Phi-3.5-mini-instruct"),
        ("Phi-4-mini-instruct", "microsoft/Phi-4-mini-instruct"),
        ("microsoft/Phi-4-reasoning-pluss", "microsoft/Phi-4-reasoning-plus"),
        ("acme/foo", None),
    ],
)
def test_a_name_that_is_begun_or_misspelt_leads_to_the_model(typed, meant):
    assert nearest_known(typed) == meant


def test_a_mirror_is_not_taken_for_the_model():
    # unsloth/phi-4 and unsloth/Phi-3.5-mini-instruct are Llama-shaped.
    assert known_config("unsloth/phi-4") is None


def test_a_folder_of_the_same_name_comes_before_the_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "microsoft" / "phi-4"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "phi3", "hidden_size": 64}', encoding="utf-8")
    assert read_config("microsoft/phi-4", prefer_shipped=True) == {"model_type": "phi3", "hidden_size": 64}


def test_training_reads_the_models_own_config(monkeypatch):
    def refuse(name, revision):
        raise ModelError("The hub was asked.")

    monkeypatch.setattr("qlora_phi3.family._fetch_config", refuse)
    assert read_config("microsoft/phi-4", prefer_shipped=True)["hidden_size"] == 5120
    with pytest.raises(ModelError, match="The hub was asked"):
        read_config("microsoft/phi-4")

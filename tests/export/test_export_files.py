"""What lies beside the exported weights is the base's own, byte for byte, but for what must change."""

import json
import shutil

import pytest
from workshop import read_json

from qlora_phi3.errors import ExportError
from qlora_phi3.export.bundle import write_companions

USUAL = {"dtype": "float16", "untied": False, "end_of_turn": 7, "template": None}


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
    copied = write_companions(*places, **USUAL).copied
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "LICENSE"} <= copied.keys()
    for name in copied:
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_the_config_says_the_new_dtype_and_keeps_all_the_rest(places):
    source, _, target = places
    change(source / "config.json", torch_dtype="bfloat16", auto_map={"AutoConfig": "configuration_phi3.Phi3Config"})
    before = read_json(source / "config.json")
    changed = write_companions(*places, **USUAL).changed
    after = read_json(target / "config.json")
    assert after == {
        **{key: value for key, value in before.items() if key != "auto_map"},
        **{key: "float16" for key in ("torch_dtype", "dtype") if key in before},
    }
    assert "config.json: auto_map removed" in changed


def test_tied_embeddings_are_untied_where_the_head_was_trained(places):
    source, _, target = places
    change(source / "config.json", tie_word_embeddings=True)
    write_companions(*places, **{**USUAL, "untied": True})
    assert read_json(target / "config.json")["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("stops", "expected"), [([2, 3], [2, 3, 7]), (2, [2, 7]), ([7, 2], [7, 2]), (None, [7])], ids=str
)
def test_generation_stops_at_all_it_stopped_at_and_at_the_end_of_a_turn(places, stops, expected):
    source, _, target = places
    change(source / "config.json", eos_token_id=stops)
    (source / "generation_config.json").write_text(
        json.dumps({"do_sample": False} | ({} if stops is None else {"eos_token_id": stops})), encoding="utf-8"
    )
    write_companions(*places, **USUAL)
    assert read_json(target / "generation_config.json") == {"do_sample": False, "eos_token_id": expected}


def test_a_base_without_a_generation_config_gets_one_that_stops(places):
    source, adapter, target = places
    for folder in (source, adapter):
        (folder / "generation_config.json").unlink()
    change(source / "config.json", eos_token_id=2)
    write_companions(*places, **USUAL)
    assert read_json(target / "generation_config.json") == {"eos_token_id": [2, 7]}


def test_a_tokenizer_that_was_changed_since_the_run_is_refused_by_name(places):
    source, _, _ = places
    change(source / "tokenizer_config.json", eos_token="<|end|>")
    with pytest.raises(ExportError, match=r"tokenizer_config\.json is not the file that was trained with"):
        write_companions(*places, **USUAL)


@pytest.mark.parametrize("name", ["tokenizer.model", "generation_config.json"])
def test_a_file_that_was_trained_with_and_that_the_base_lacks_is_not_dropped_in_silence(places, name):
    source, adapter, _ = places
    (source / name).unlink()
    with pytest.raises(ExportError) as caught:
        write_companions(*places, **USUAL)
    assert caught.value.message == f"{source / name} is missing, and the run trained with one."
    assert str(adapter / name) in caught.value.hint


def test_a_tokenizer_file_that_came_after_the_run_is_refused_as_what_it_is(places):
    _, adapter, _ = places
    (adapter / "tokenizer.model").unlink()
    with pytest.raises(ExportError, match=r"tokenizer\.model was not there when the run was trained\. Move it away"):
        write_companions(*places, **USUAL)


def test_a_template_of_the_recipes_own_goes_along(places):
    _, _, target = places
    write_companions(*places, **{**USUAL, "template": "{{ messages }}"})
    assert (target / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"

"""The answer and what goes with it: margin, cache, cures, the longest row, the groups of cards, the recipe of the plan."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_model import build_config
from workshop import build_base, write_chats

from qlora_phi3.errors import DeviceError
from qlora_phi3.family import parse_architecture
from qlora_phi3.hardware.gpu import GpuProcess, find_gpu, gpu_of_size
from qlora_phi3.hardware.gpu_table import CARDS
from qlora_phi3.memory import cached as cache
from qlora_phi3.memory.fit import write_fitted
from qlora_phi3.memory.margin import LEAST_BYTES, Margin, budget_of, margin_share, read_margin, record_error
from qlora_phi3.memory.plan import assume_lengths
from qlora_phi3.memory.report import as_json, from_json, merge_categories
from qlora_phi3.memory.search import MaxLengthSearch, minimal_prediction, round_length
from qlora_phi3.memory.tables import (
    build_gpu_table,
    find_max_lengths,
    gpu_table_as_json,
    gpu_table_from_json,
    group_gpus,
)
from qlora_phi3.memory.vram_check import LengthsReport, RecipeContext, VramChecker, read_recipe_context
from qlora_phi3.recipe.edit import Choice, fit_recipe
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.units import GIB, MIB

CARD = find_gpu("RTX 3070")


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """State and cache of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))


def build_recipe(**tables):
    usual = {"model": {"name": "tiny"}, "data": {"train": "rows.jsonl"}}
    training = {"batch_size": 4, "max_length": 256, **tables.pop("training", {})}
    return Recipe.model_validate({**usual, "training": training, **tables})


def build_bench(shape=None, **tables):
    recipe = build_recipe(**tables)
    config = json.loads(json.dumps(build_config(**{"vocab_size": 2048, **(shape or {})}).to_dict(), default=str))
    rows = LengthsReport(assume_lengths(recipe.training.max_length, recipe.training.batch_size), "assumed")
    context = RecipeContext(recipe=recipe, config=config, architecture=parse_architecture(config, "tiny"), rows=rows)
    return VramChecker(context, lambda _: None)


def card_with(checker, mib):
    """A card that leaves a run so much beside the CUDA context and the margin."""
    num_bytes = checker.predictor(CARD).on_card(mib * MIB) + LEAST_BYTES
    return replace(CARD, total_bytes=num_bytes, free_bytes=num_bytes)


def answer_on(checker, card):
    return checker.report(card, card.free_bytes)


# The margin


def test_the_margin_is_three_percent_and_at_least_128_mib():
    assert read_margin("a card") == Margin(0.03)
    assert Margin(0.03).bytes_for(10 * GIB) == int(10 * GIB * 0.03)
    assert Margin(0.03).bytes_for(GIB) == 128 * MIB


@pytest.mark.parametrize("budget", [GIB, 4 * GIB, 24 * GIB])
@pytest.mark.parametrize("share", [0.03, 0.12])
def test_a_prediction_at_the_limit_and_its_margin_make_the_budget(budget, share):
    margin = Margin(share)
    limit = margin.limit(budget)
    assert budget - 2 <= limit + margin.bytes_for(limit) <= budget


def test_a_run_that_took_more_than_predicted_widens_the_margin_of_its_card_alone():
    record_error("this card", 1000, 1040)
    record_error("this card", 1000, 900)
    assert margin_share("this card") == pytest.approx(0.06)
    assert read_margin("this card").runs == 2
    assert read_margin("this card").widened
    assert margin_share("that card") == 0.03


def test_a_run_that_took_less_leaves_the_margin_as_it_is():
    record_error("this card", 1000, 700)
    assert margin_share("this card") == 0.03


@pytest.mark.parametrize("text", ["", "[]", '{"this card": 3}', '{"this card": [{"predicted_bytes": 0}, 7]}'])
def test_a_spoilt_record_of_errors_is_passed_over(tmp_path, text):
    record_error("this card", 1000, 1100)
    (path,) = tmp_path.rglob("prediction-errors.json")
    path.write_text(text, encoding="utf-8")
    assert margin_share("this card") == 0.03


def test_the_budget_is_what_is_free_or_less_where_the_recipe_says_so():
    taken = replace(CARD, is_local=True, free_bytes=5 * GIB)
    assert budget_of(build_recipe(), taken) == 5 * GIB
    assert budget_of(build_recipe(memory={"budget": "3GiB"}), taken) == 3 * GIB
    assert budget_of(build_recipe(memory={"budget": "6GiB"}), taken) == 5 * GIB
    with pytest.raises(DeviceError, match=r'budget = "20GiB", and RTX 3070 8GB has 7\.\d+ GiB'):
        budget_of(build_recipe(memory={"budget": "20GiB"}), taken)


# The cache


def test_an_answer_is_found_while_the_files_it_was_read_from_stay_as_they_are(tmp_path):
    watched = tmp_path / "config.json"
    absent = tmp_path / "tokenizer.json"
    watched.write_text("{}", encoding="utf-8")
    cache.store("key", {"a": 1}, cache.watch([watched, absent]))
    assert cache.find_cached("key") == {"a": 1}
    assert cache.find_cached("another") is None
    absent.write_text("{}", encoding="utf-8")
    assert cache.find_cached("key") is None
    absent.unlink()
    assert cache.find_cached("key") == {"a": 1}
    watched.write_text("{ }", encoding="utf-8")
    assert cache.find_cached("key") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"answer": 1}', '{"answer": 1, "watched": 3}'])
def test_a_spoilt_file_of_the_cache_is_no_answer(tmp_path, text):
    cache.store("key", 1, {})
    (path,) = (tmp_path / "cache").rglob("key.json")
    path.write_text(text, encoding="utf-8")
    assert cache.find_cached("key") is None


def test_the_key_changes_with_the_question_and_with_a_library(monkeypatch):
    key = cache.cache_key({"recipe": "a"})
    assert key == cache.cache_key({"recipe": "a"}) != cache.cache_key({"recipe": "b"})
    monkeypatch.setattr(cache, "version", lambda name: "9.9")
    assert cache.cache_key({"recipe": "a"}) != key


def test_old_answers_go(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "KEPT", 2)
    for number in range(4):
        cache.store(str(number), number, {})
        (path,) = (tmp_path / "cache").rglob(f"{number}.json")
        os.utime(path, (number, number))
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 2


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    cache.store("key", 1, {})
    assert cache.find_cached("key") is None


# The answer


@pytest.fixture(scope="module")
def checker():
    return build_bench()


@pytest.fixture(scope="module")
def report(checker):
    return checker.report(CARD, CARD.free_bytes)


def test_an_answer_goes_to_json_and_back(report):
    is_local = replace(
        report, device=replace(CARD, is_local=True, processes=(GpuProcess(name="Xorg", pid=7, used_bytes=None),))
    )
    saved = json.loads(json.dumps(as_json(is_local)))
    assert saved["processes"] == [{"name": "Xorg", "pid": 7, "used_bytes": None}]
    assert from_json(saved) == is_local


@pytest.mark.parametrize("change", [{"device": None}, {"rows": {}}, {"unknown": 1}, {"suggestions": [{}]}])
def test_what_is_no_answer_is_refused(report, change):
    with pytest.raises(ValueError, match="no answer"):
        from_json({**as_json(report), **change})


def test_the_figures_of_an_answer_agree_with_each_other(report):
    assert report.fits
    assert sum(report.categories.values()) == report.peak_allocated_bytes == max(report.phases.values())
    assert list(report.categories.values()) == sorted(report.categories.values(), reverse=True)
    assert report.peak_allocated_bytes <= report.peak_reserved_bytes < report.peak_on_card_bytes
    assert report.peak_on_card_bytes + report.margin_bytes <= report.budget_bytes == CARD.free_bytes
    assert report.micro_batch_size * report.gradient_accumulation_steps == report.batch_size == 4
    assert report.tokens_per_second == pytest.approx(4 * 256 / report.seconds_per_step)


def test_tenants_are_named_in_the_words_of_the_field_and_added_up():
    named = merge_categories({"forward": 5, "gradients": 6, "evaluation": 2, "load": 1, "other weights": 3})
    assert list(named.items()) == [("activations", 7), ("gradients", 6), ("unquantized weights", 4)]


def test_cards_without_bfloat16_compute_in_float16_unless_the_recipe_says_otherwise():
    old = replace(CARD, compute_capability=(7, 5))
    assert build_bench().report(old, old.free_bytes).compute_dtype == "float16"
    asked = build_bench(quantization={"bnb_4bit_compute_dtype": "float32"})
    assert asked.report(old, old.free_bytes).compute_dtype == "float32"


# What would help

WIDE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 8}
PINS = {
    "max_length": 512,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
}


def test_what_a_recipe_pins_is_given_back_first_and_what_each_change_saves_adds_up():
    checker = build_bench(WIDE, training=PINS)
    report = answer_on(checker, card_with(checker, 140))
    assert report.verdict == "does_not_fit"
    assert [hint.text.split(":")[0] for hint in report.suggestions] == [
        'Write [training] gradient_checkpointing = "auto"',
        'Write [training] per_device_train_batch_size = "auto" and batch_size = 4 (no gradient_accumulation_steps)',
    ]
    assert [hint.fits for hint in report.suggestions] == [False, True]
    assert report.no_fix_reason == ""


def test_programs_on_the_card_are_closed_before_the_recipe_is_touched(checker):
    crowded = replace(
        CARD, is_local=True, free_bytes=200 * MIB, processes=(GpuProcess(name="game.exe", pid=1, used_bytes=GIB),)
    )
    report = checker.report(crowded, crowded.free_bytes)
    (hint,) = report.suggestions
    assert hint.text == "Close other programs on the card (game.exe)"
    assert hint.saved_bytes == CARD.total_bytes - 200 * MIB
    assert hint.fits
    assert hint.widens


def test_shorter_rows_come_after_everything_that_keeps_the_data_whole():
    changed = {"quantization": {"load_in_4bit": False}, "lora": {"modules_to_save": ["lm_head"]}}
    checker = build_bench(WIDE, training={"max_length": 512}, **changed)
    report = answer_on(checker, card_with(checker, 80))
    keys = [re.search(r"load_in_4bit|modules_to_save|max_length", hint.text)[0] for hint in report.suggestions]
    assert keys == ["load_in_4bit", "modules_to_save", "max_length"]
    assert [hint.fits for hint in report.suggestions] == [False, False, True]
    assert all(hint.saved_bytes > 0 for hint in report.suggestions)


def test_a_rank_is_lowered_until_it_fits_and_told_in_one_line():
    checker = build_bench(WIDE, lora={"r": 512})
    report = answer_on(checker, card_with(checker, 80))
    (hint,) = report.suggestions
    assert re.match(r"Write \[lora\] r = (32|8) instead of 512:", hint.text)
    assert hint.fits
    rank = int(re.search(r"r = (\d+)", hint.text)[1])
    followed = build_bench(WIDE, lora={"r": rank})
    assert answer_on(followed, card_with(followed, 80)).fits
    before = build_bench(WIDE, lora={"r": rank * 4})
    assert not answer_on(before, card_with(before, 80)).fits


def test_a_row_that_no_change_makes_fit_says_which_card_would(checker):
    report = answer_on(checker, card_with(checker, 1))
    assert report.verdict == "does_not_fit"
    assert not any(hint.fits for hint in report.suggestions)
    assert "needs" in report.no_fix_reason
    assert "A card of 4 GB would do" in report.no_fix_reason


# The longest row


@pytest.mark.parametrize("room", [0, 99, 100, 640, 5_000, 123_456, 10**9])
def test_the_longest_row_is_found_along_a_line(room):
    asked = []

    def needs(length):
        asked.append(length)
        return 36 + length

    length = MaxLengthSearch(needs, 65_536).within(room)
    assert length % 64 == 0
    assert length <= 65_536
    if length:
        assert needs(length) <= room
    if length < 65_536:
        assert room < needs(length + max(64, length // 128) + 64)
    assert len(asked) < 12


def test_the_longest_row_is_found_along_a_bent_curve_and_what_was_asked_is_remembered():
    asked = []

    def needs(length):
        asked.append(length)
        return length**2 // 500 + 10 * length

    search = MaxLengthSearch(needs, 65_536)
    first = search.within(500_000)
    assert needs(first) <= 500_000 < needs(first + 256)
    before = len(asked)
    assert search.within(500_000) == first
    assert len(asked) == before


# Many cards


def test_every_consumer_card_from_4_to_24_gb_stands_in_one_group():
    groups = group_gpus()
    labels = [label for group in groups for label in group.device.represents]
    assert len(labels) == len(set(labels))
    assert {group.nominal_gb for group in groups} == {4, 6, 8, 10, 11, 12, 16, 24}
    assert {card.name for card in CARDS} - {card.name for card in CARDS if card.label in labels} == {
        "RTX 5090", "Tesla T4", "RTX A2000 Laptop", "RTX A2000", "RTX A4000", "RTX A5000", "A10", "A10G", "L4",
    }  # fmt: skip
    assert [group.nominal_gb for group in groups] == sorted(group.nominal_gb for group in groups)


def test_a_group_has_the_memory_of_its_smallest_card():
    for group in group_gpus():
        cards = [card for card in CARDS if card.label in group.device.represents]
        assert group.device.total_bytes == min(card.usable_bytes for card in cards)
        assert len({card.compute_capability >= (8, 0) for card in cards}) == 1


def test_a_survey_goes_to_json_and_back_and_names_the_slowest_and_the_fastest_card(checker):
    groups = [group for group in group_gpus() if group.nominal_gb == 10]
    rows = build_gpu_table(checker, groups, lambda *_: None)
    assert gpu_table_from_json(json.loads(json.dumps(gpu_table_as_json(rows)))) == rows
    (row,) = rows
    assert row.series == "RTX 30"
    assert row.report.fits
    report = row.report
    assert report.slowest_tokens_per_second <= report.tokens_per_second <= report.fastest_tokens_per_second


@pytest.mark.parametrize("size_gb", [4, 12, 24])
def test_a_card_of_a_size_gets_the_answer_of_its_line_in_the_table(checker, size_gb):
    (group,) = [group for group in group_gpus() if group.nominal_gb == size_gb and "30" in group.series]
    (row,) = build_gpu_table(checker, [group], lambda *_: None)
    card = gpu_of_size(size_gb * GIB)
    alone = checker.report(card, card.free_bytes)
    assert replace(alone, device=row.report.device, created=row.report.created) == row.report
    assert alone.slowest_tokens_per_second < alone.tokens_per_second < alone.fastest_tokens_per_second


def test_on_a_large_card_the_longest_row_is_all_the_positions_of_a_small_model(checker):
    (row,) = find_max_lengths(checker, [CARD], lambda *_: None)
    assert (row.max_length, row.at_the_models_end) == (512, True)
    assert row.peak_on_card_bytes < CARD.free_bytes


def test_the_longest_row_fits_the_next_does_not_and_other_cards_change_nothing():
    checker = build_bench({"max_position_embeddings": 16_384})
    cards = [card_with(checker, mib) for mib in (60, 100)]
    alone = [find_max_lengths(checker, [card], lambda *_: None)[0] for card in cards]
    assert find_max_lengths(checker, cards, lambda *_: None) == alone
    assert 0 < alone[0].max_length < alone[1].max_length < 16_384
    for card, row in zip(cards, alone, strict=True):
        longer = row.max_length * 9 // 8  # a page of the allocator is much, beside a tiny model
        predictor = checker.predictor(card)
        fits, fails = (
            minimal_prediction(predictor, replace(assume_lengths(length, 1), longest_evaluation=0), limit_bytes=limit)
            for length in (row.max_length, longer)
            for limit in (card.free_bytes - LEAST_BYTES,)
        )
        assert (fits.fits, fails.fits) == (True, False)


@pytest.mark.parametrize(("length", "reported"), [(0, 0), (63, 0), (64, 64), (4_095, 4_032), (81_999, 81_920)])
def test_lengths_are_reported_in_steps_of_two_percent(length, reported):
    assert round_length(length) == reported


# The lengths


def test_rows_are_counted_where_tokenizer_and_data_are_here(tmp_path):
    base = build_base(tmp_path / "base")
    write_chats(tmp_path / "chats.jsonl", rows=20)
    recipe = Recipe.model_validate(
        {"model": {"name": "base"}, "data": {"train": "chats.jsonl", "eval_size": 4}, "training": {"max_length": 128}}
    )
    context = read_recipe_context(recipe, tmp_path, lambda *_: None)
    assert context.recipe.model.name == str(base)
    assert not context.rows.lengths.assumed
    assert len(context.rows.lengths.training) == 16
    assert 0 < context.rows.lengths.longest <= 128
    assert context.rows.origin.startswith("16 to train on and 4 to measure on, the longest ")


def test_rows_are_assumed_where_the_data_are_missing_and_the_reason_is_told(tmp_path):
    build_base(tmp_path / "base")
    recipe = Recipe.model_validate(
        {
            "model": {"name": "base"},
            "data": {"train": "chats.jsonl"},
            "training": {"max_length": 128, "do_eval": False},
        }
    )
    rows = read_recipe_context(recipe, tmp_path, lambda *_: None).rows
    assert rows.lengths.assumed
    assert (rows.lengths.training, rows.lengths.longest_evaluation) == ((128,) * 16, 0)
    assert "max_length = 128 tokens each" in rows.origin
    assert rows.problem.startswith("There is no data file 'chats.jsonl'")


# The recipe of the plan

TEXT = """# Mine
[model]
name = "tiny"  # the base

[data]
train = "rows.jsonl"
[training]
optim = "auto"     # let it choose
batch_size = 4
max_length = 256
"""


def write_fit(tmp_path, report, text=TEXT, overrides=(), target="fit.toml"):
    source = tmp_path / "mine.toml"
    source.write_text(text, encoding="utf-8")
    target = tmp_path / target
    target.parent.mkdir(exist_ok=True)
    recipe = load_recipe(source, overrides)
    return recipe, write_fitted(recipe, text, overrides, report, source=source, target=target), target


def test_the_fitted_recipe_keeps_its_authors_lines_and_gives_the_same_plan(tmp_path, checker, report):
    _, fitted, target = write_fit(tmp_path, report)
    text = target.read_text(encoding="utf-8")
    for line in ("# Mine", 'name = "tiny"  # the base', "batch_size = 4", "# let it choose"):
        assert line in text
    assert "# Set up for RTX 3070 8GB by qlora-phi3" in text
    assert load_recipe(target) == fitted
    again = VramChecker(replace(checker.context, recipe=load_recipe(target)), lambda _: None).report(
        CARD, CARD.free_bytes
    )
    same = {"created": "", "reasons": {}}
    assert replace(again, **same) == replace(report, **same)


def test_a_recipe_that_cannot_be_edited_line_by_line_is_written_out_anew(tmp_path, report):
    text = 'model = { name = "tiny" }\ndata.train = "rows.jsonl"\ntraining = { batch_size = 4, max_length = 256 }\n'
    recipe, fitted, target = write_fit(tmp_path, report, text)
    assert load_recipe(target) == fitted
    assert fitted.training.optim == report.optim
    assert fitted.training.max_length == recipe.training.max_length


def test_what_the_command_line_changed_is_in_the_fitted_recipe(tmp_path, report):
    recipe, _, target = write_fit(tmp_path, report, overrides=("lora.r=8", "training.optim=adamw_torch"))
    assert load_recipe(target).lora.r == recipe.lora.r == 8
    assert load_recipe(target).training.optim == "adamw_torch"


def test_files_are_found_from_the_fitted_recipes_folder(tmp_path, report):
    (tmp_path / "rows.jsonl").write_text("{}", encoding="utf-8")
    _, _, target = write_fit(tmp_path, report, target="other/fit.toml")
    train = load_recipe(target).data.train
    assert train == "../rows.jsonl"
    assert (target.parent / train).is_file()


def test_a_file_that_is_there_is_not_overwritten(tmp_path, report):
    (tmp_path / "fit.toml").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError):
        write_fit(tmp_path, report)
    assert (tmp_path / "fit.toml").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('optim = "auto"', ['optim = "adamw_8bit"                # why']),
        ('optim = "auto" # mine', ["# why", 'optim = "adamw_8bit" # mine']),
        ('  optim="auto"       # mine', ["# why", '  optim="adamw_8bit"       # mine']),
        ("optim = 'auto'", ['optim = "adamw_8bit"                # why']),
    ],
)
def test_a_line_gets_its_value_and_its_reason(line, expected):
    text = f'[model]\nname = "tiny"\n[data]\ntrain = "a#b.jsonl" # optim = "auto"\n[training]\n{line}\n'
    recipe = Recipe.model_validate({"model": {"name": "tiny"}, "data": {"train": "a#b.jsonl"}})
    chosen, written = fit_recipe(recipe, text, [Choice("training", "optim", "adamw_8bit", "why")], "Why")
    assert chosen.training.optim == "adamw_8bit"
    assert written.splitlines() == ["# Why", "", *text.splitlines()[:-1], *expected]


def test_state_and_cache_lie_where_the_system_wants_them(monkeypatch, tmp_path):
    from qlora_phi3.files import user_cache_dir, user_state_dir

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr("sys.platform", "linux")
    assert user_cache_dir() == tmp_path / ".cache" / "qlora-phi3"
    assert user_state_dir() == tmp_path / "state" / "qlora-phi3"

"""Turns that end are counted, at their own limits, with the export's own stop ids."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from tiny import build_tokenizer, hub_template
from tiny_model import build_config, save_tiny_model
from transformers import GenerationConfig, Phi3ForCausalLM

from qlora_phi3.export.proof import Proof, Score
from qlora_phi3.export.stop import (
    MAX_PROMPTS,
    Prompt,
    StopTest,
    choose_dtype,
    choose_prompts,
    measure_stops,
    runaway_warning,
)

CPU = torch.device("cpu")
STOP, OTHER_STOP = 300, 450


def quiet(what: str, done: int, total: int | None) -> None:
    """Progress that is not shown."""


@pytest.fixture(scope="module")
def counter(tmp_path_factory: Any) -> Path:
    """A model whose most likely token after n is n + 1, and which stops at 300 and 450."""
    torch.manual_seed(0)
    model = Phi3ForCausalLM(build_config(num_hidden_layers=1))
    model.model.embed_tokens.weight.data.normal_()
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.roll(1, 0).clone()
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.data.zero_()
    model.generation_config = GenerationConfig(eos_token_id=[STOP, OTHER_STOP], pad_token_id=STOP)
    folder = tmp_path_factory.mktemp("counter")
    model.save_pretrained(folder)
    build_tokenizer(hub_template("Phi-3-mini-4k-instruct")).save_pretrained(folder)
    return folder


def row(last: int, prompt: int, answer: int) -> dict[str, list[int]]:
    """A prompt of so many tokens, ending in `last`, and its answer."""
    ids = [5] * (prompt - 1) + [last] + [9] * answer
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def proof(live: float | None = 1.0, exported: float | None = 0.75, turns: int = 8) -> Proof:
    def score(name: str, share: float | None) -> Score:
        return Score(
            name=name,
            loss=1,
            mean_kl=0,
            max_kl=0,
            top_agreement=1,
            stop_share=share,
            fault_mean_kl=0,
            fault_max_kl=0,
        )

    return Proof(rows=1, tokens=9, turns=turns, trained=False, scores=(score("live", live), score("nf4", exported)))


def test_an_answer_that_reaches_a_stop_id_within_its_own_limit_is_counted(counter):
    rows = [
        row(STOP - 32, prompt=4, answer=3),  # reaches 300 with the last of its 32 tokens
        row(STOP - 33, prompt=9, answer=3),  # one too late
        row(OTHER_STOP - 50, prompt=2, answer=40),  # reaches 450 within twice its 40
        row(STOP - 50, prompt=6, answer=20),  # 50 tokens, and 40 are allowed, though another in the batch may take 80
    ]
    found = measure_stops(counter, rows, proof(), "nf4", progress=quiet)
    assert (found.method, found.turns, found.stopped) == ("generated", 4, 2)
    assert json.loads(json.dumps(found.as_dict()))["share"] == 0.5


def test_the_stop_ids_are_those_of_the_exports_generation_config(counter, tmp_path):
    folder = tmp_path / "one-stop"
    folder.mkdir()
    for file in counter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    GenerationConfig(eos_token_id=STOP).save_pretrained(folder)
    rows = [row(STOP - 9, prompt=4, answer=3), row(OTHER_STOP - 9, prompt=4, answer=3)]
    assert measure_stops(counter, rows, proof(), "nf4", progress=quiet).stopped == 2
    assert measure_stops(folder, rows, proof(), "nf4", progress=quiet).stopped == 1


def test_progress_never_goes_back_and_ends_at_its_total(counter):
    calls: list[tuple[int, int | None]] = []
    rows = [row(STOP - 20, prompt=500, answer=3) for _ in range(6)]
    measure_stops(counter, rows, proof(), "nf4", progress=lambda _, done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (64, 64)  # two batches


def test_a_model_that_does_not_fit_is_looked_up_in_the_proof(counter):
    found = measure_stops(counter, [row(40, 4, 3)], proof(), "nf4", max_ram_bytes=2**20, progress=quiet)
    assert (found.method, found.turns, found.stopped, found.live_share) == ("most likely token", 8, 6, 1.0)


def test_without_a_prompt_or_a_turn_that_ends_there_is_no_share(counter):
    found = measure_stops(counter, [row(40, 4, 200)], proof(None, None, turns=0), "nf4", progress=quiet)
    assert found.as_dict()["share"] is None


@pytest.mark.parametrize(
    ("stopped", "turns", "part"),
    [
        (0, 4, "never"),
        (7, 16, "only 7 of 16"),
        (8, 16, None),
        (0, 3, None),
        (0, 0, None),
    ],
)
def test_a_model_that_rarely_ends_its_turn_gets_a_warning(stopped, turns, part):
    stops = StopTest(method="generated", turns=turns, stopped=stopped, live_share=None).as_dict()
    assert (part in runaway_warning(stops)) if part else runaway_warning(stops) is None


def test_a_model_that_answers_nothing_gets_a_warning_although_it_ends_every_turn():
    stops = StopTest(method="generated", turns=6, stopped=6, live_share=None, empty=6).as_dict()
    assert "6 of 6 answers are empty" in runaway_warning(stops)
    assert runaway_warning(stops | {"empty": 2}) is None


def test_prompts_end_where_the_first_turn_begins_and_the_shortest_go_first():
    two_turns = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, 3, -100, 5, 6]}
    assert choose_prompts([row(7, 12, 60), two_turns]) == [Prompt([1, 2], 32), Prompt([5] * 11 + [7], 120)]
    assert len(choose_prompts([row(7, 12, 3)] * 99)) == MAX_PROMPTS


def test_a_prompt_whose_own_answer_is_too_long_or_that_is_no_prompt_is_passed_over():
    nothing = {"input_ids": [1, 2], "labels": [1, -100]}
    assert choose_prompts([row(7, 4, 129), row(7, 1000, 3), nothing]) == []


def test_on_a_cpu_it_is_loaded_in_fp32_if_that_fits_and_else_in_its_own_dtype(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}), encoding="utf-8")
    # 426,624 weights and a tenth; 2,048 tokens with 2 layers of 2 x 64 cached numbers each
    numbers = 1.1 * 426_624 + 2048 * 2 * 128
    assert choose_dtype(folder, CPU, None) == torch.float32
    held = 2**30
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=held)))
    assert choose_dtype(folder, CPU, held + int(numbers * 4) + 1) == torch.float32
    assert choose_dtype(folder, CPU, held + int(numbers * 4) - 1) == torch.float16
    assert choose_dtype(folder, CPU, held + int(numbers * 2) - 1) is None

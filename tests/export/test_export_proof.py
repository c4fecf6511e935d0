"""What the proof says is what the whole logits say, and it tells a faithful export from one that is not."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tiny_model import Precision, random_rows, save_tiny_model
from tiny_run import TinyRun, leave_run
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import Phi3ForCausalLM

from qlora_phi3.adapters.adapter_deltas import read_deltas
from qlora_phi3.errors import ExportError
from qlora_phi3.export import proof as proving
from qlora_phi3.export.merge import live_model, make_candidates
from qlora_phi3.export.proof import Proof, Score, choose_onto, choose_rows, find_difference, find_fault, prove
from qlora_phi3.export.streamed import stream_plain
from qlora_phi3.export.writer import plan_shards, write_shards
from qlora_phi3.family import parse_architecture, read_config
from qlora_phi3.model.weights import open_weights
from qlora_phi3.recipe.schema import Lora

STOP = 7
BOTH = ("nf4", "original")
BF16 = Precision(compute_dtype=torch.bfloat16, reason="the test asks for it")


def quiet(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def rows_with_ends(lengths: list[int]) -> list[dict[str, list[int]]]:
    rows = random_rows(lengths)
    for row in rows:
        row["input_ids"][-1] = row["labels"][-1] = STOP
    return rows


def prove_run(run: TinyRun, dtype: Any = torch.float32, rows: Any = None, ontos: Any = BOTH, **options: Any) -> Proof:
    """The proof of a run's merges."""
    config, base = read_config(str(run.base)), run.open_base()
    deltas = read_deltas(run.adapter, config)
    return prove(
        live_model(base, config, run.adapter),
        make_candidates(base, deltas, config, run.adapter, dtype=dtype, ontos=ontos),
        rows or rows_with_ends([60, 40, 33, 12]),
        parse_architecture(config, "tiny"),
        **{"stop_ids": [STOP], "progress": quiet, **options},
    )


def logits_of(model: Any, rows: list[dict[str, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of the supervised positions, row by row, by the model's own forward."""
    logits, targets = [], []
    with torch.no_grad():
        for row in rows:
            whole = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
            labels = torch.tensor(row["labels"][1:])
            logits.append(whole[labels >= 0])
            targets.append(labels[labels >= 0])
    return torch.cat(logits), torch.cat(targets)


@pytest.mark.parametrize(("tile", "piece_bytes"), [(2048, 2**23), (64, 2**23), (64, 2**15), (100, 2**16)])
def test_the_scores_are_those_of_the_whole_logits(tmp_path, monkeypatch, tile, piece_bytes):
    monkeypatch.setattr("qlora_phi3.model.weights.PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(proving, "TILE_VOCABULARY", tile)
    monkeypatch.setattr(proving, "TILE_POSITIONS", 16)
    run = leave_run(tmp_path, save_tiny_model(tmp_path / "base"))
    rows = rows_with_ends([60, 40, 33, 12])
    merged = run.merged(onto="original")
    write_shards(merged, tmp_path / "out", plan_shards(merged.info, 2**30), key="")
    (tmp_path / "out" / "config.json").write_bytes((run.base / "config.json").read_bytes())
    live, targets = logits_of(run.live.eval(), rows)
    merged_logits, _ = logits_of(Phi3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), rows)
    divergence = kl_div(log_softmax(merged_logits, 1), log_softmax(live, 1), log_target=True, reduction="none").sum(1)

    found = prove_run(run, rows=rows)
    score = found.of("original")
    assert (found.rows, found.tokens, found.turns) == (4, len(targets), 4)
    assert found.of("live").loss == pytest.approx(float(cross_entropy(live, targets)), rel=1e-6)
    assert score.loss == pytest.approx(float(cross_entropy(merged_logits, targets)), rel=1e-6)
    assert score.mean_kl == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert score.max_kl == pytest.approx(float(divergence.max()), rel=1e-4)
    assert score.top_agreement == pytest.approx(float((live.argmax(1) == merged_logits.argmax(1)).double().mean()))
    assert score.mean_kl > 1e-4
    assert score.top_agreement < 1


VARIANTS = {
    "lora": (Lora(r=8), {}),
    "dora": (Lora(r=8, use_dora=True), {}),
    "saved": (Lora(r=8, modules_to_save=["lm_head", "embed_tokens"]), {}),
    "untied": (Lora(r=8, modules_to_save=["lm_head"]), {"tie_word_embeddings": True}),
    "tied": (Lora(r=8, use_rslora=True, alpha_pattern={"o_proj": 40}), {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize(("lora", "config"), VARIANTS.values(), ids=VARIANTS.keys())
def test_a_merge_onto_nf4_is_the_live_model(tmp_path, lora, config):
    run = leave_run(tmp_path, save_tiny_model(tmp_path / "base", **config), lora=lora)
    in_fp32, in_fp16 = (prove_run(run, dtype, ontos=["nf4"]).of("nf4") for dtype in (torch.float32, torch.float16))
    assert in_fp32.max_kl < 1e-9
    assert 0 < in_fp16.mean_kl < 1e-6
    assert in_fp32.top_agreement == 1


def test_fp32_logits_of_a_merge_onto_nf4_agree_to_a_ten_thousandth(tmp_path):
    run = leave_run(tmp_path, save_tiny_model(tmp_path / "base"))
    config = read_config(str(run.base))
    rows = rows_with_ends([60, 40])
    write_shards(run.merged(), tmp_path / "out", plan_shards(run.merged().info, 2**18), key="")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    live, _ = logits_of(run.live.eval(), rows)
    merged, _ = logits_of(Phi3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), rows)
    assert float((live - merged).norm() / live.norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_merges_of_a_bf16_run_are_faithful_to_what_they_were_made_of(tmp_path, dtype):
    run = leave_run(tmp_path, save_tiny_model(tmp_path / "base"), precision=BF16)
    found = prove_run(run, dtype)
    for score in found.scores:
        assert find_fault(score, dtype) is None
    assert found.of("original").mean_kl > 100 * found.of("original").fault_mean_kl


def test_a_merge_keeps_the_files_own_embedding_which_is_no_fault_where_the_run_rounded_it(tmp_path):
    run = leave_run(tmp_path, save_tiny_model(tmp_path / "base"), precision=BF16)  # the base is stored in fp32
    nf4 = prove_run(run, ontos=["nf4"]).of("nf4")
    assert nf4.fault_mean_kl < 1e-9 < 1e-6 < nf4.mean_kl


def test_a_merge_that_is_not_checked_costs_no_pass_of_its_own_and_has_no_fault(tmp_path):
    run = leave_run(tmp_path, save_tiny_model(tmp_path / "base"))
    config, base, told = read_config(str(run.base)), run.open_base(), set()
    found = prove(
        live_model(base, config, run.adapter),
        make_candidates(
            base, read_deltas(run.adapter, config), config, run.adapter, dtype=torch.float16, checked=["nf4"]
        ),
        rows_with_ends([30]),
        parse_architecture(config, "tiny"),
        stop_ids=[STOP],
        progress=lambda what, done, total: told.add(what),
    )
    assert told == {
        *(f"Proof {n} of 3: scoring {name}, layers" for n, name in enumerate(("live", "nf4", "original"), 1)),
        "Comparing the next tokens, words",
    }
    assert found.of("original").fault_mean_kl is None
    assert find_fault(found.of("original"), torch.float16) is None


def test_another_base_in_the_files_is_told_apart(tmp_path):
    run = leave_run(tmp_path, save_tiny_model(tmp_path / "base"))
    other = leave_run(tmp_path / "2", save_tiny_model(tmp_path / "other", seed=5))
    strange = TinyRun(live=run.live, base=other.base, adapter=run.adapter, record=other.record).merged()
    write_shards(strange, tmp_path / "out", plan_shards(strange.info, 2**30), key="")
    config, base = read_config(str(run.base)), run.open_base()
    nf4, original = make_candidates(base, read_deltas(run.adapter, config), config, run.adapter, dtype=torch.float32)
    found = prove(
        live_model(base, config, run.adapter),
        [replace(nf4, open=partial(stream_plain, open_weights(tmp_path / "out"), config)), original],
        rows_with_ends([60]),
        parse_architecture(config, "tiny"),
        stop_ids=[STOP],
        progress=quiet,
    )
    assert found.of("nf4").mean_kl > 0.1
    assert "KL divergence" in str(find_fault(found.of("nf4"), torch.float16))
    assert choose_onto(found) == "original"


def score(name: str = "nf4", **changes: float) -> Score:
    values = {
        "loss": 1.0,
        "mean_kl": 0.0,
        "max_kl": 0.0,
        "top_agreement": 1.0,
        "stop_share": None,
        "fault_mean_kl": 0.0,
        "fault_max_kl": 0.0,
    }
    return Score(name=name, **{**values, **changes})


def test_the_lower_held_out_loss_is_chosen_and_nf4_where_they_are_equal():
    def proof(nf4: float, original: float) -> Proof:
        scores = (score("live"), score(loss=nf4), score("original", loss=original))
        return Proof(rows=1, tokens=1, turns=0, trained=False, scores=scores)

    assert choose_onto(proof(1.0, 0.9)) == "original"
    assert choose_onto(proof(0.9, 1.0)) == "nf4"
    assert choose_onto(proof(1.0, 1.0)) == "nf4"


def test_a_fault_is_a_mean_or_a_worst_position_beyond_the_dtypes_tolerance_or_no_number():
    assert find_fault(score(mean_kl=1.0), torch.float16) is None
    assert find_fault(score(fault_mean_kl=2e-4), torch.bfloat16) is None
    assert find_fault(score(fault_mean_kl=2e-4), torch.float16) == (
        "the mean KL divergence from base and adapter unmerged is 2.0e-04, and 1e-04 is allowed"
    )
    assert "the largest KL divergence" in str(find_fault(score(fault_max_kl=0.5), torch.bfloat16))
    assert find_fault(score(fault_mean_kl=float("nan")), torch.float16)


def test_a_file_that_differs_from_what_was_scored_in_one_bit_is_named(tmp_path):
    run = leave_run(tmp_path, save_tiny_model(tmp_path / "base"))
    config, base = read_config(str(run.base)), run.open_base()
    candidates = make_candidates(
        base, read_deltas(run.adapter, config), config, run.adapter, dtype=torch.float16, ontos=["nf4"]
    )
    prove(
        live_model(base, config, run.adapter),
        candidates,
        rows_with_ends([30]),
        parse_architecture(config, "tiny"),
        stop_ids=[STOP],
        progress=quiet,
    )
    merged, scored = run.merged(dtype=torch.float16), candidates[0].checksums
    write_shards(merged, tmp_path / "out", plan_shards(merged.info, 2**18), key="")
    assert find_difference(scored, open_weights(tmp_path / "out"), quiet) is None
    place = open_weights(tmp_path / "out").locations["model.layers.1.mlp.down_proj.weight"]
    held = bytearray(place.path.read_bytes())
    held[place.offset + 1] ^= 1
    place.path.write_bytes(held)
    assert find_difference(scored, open_weights(tmp_path / "out"), quiet) == "model.layers.1.mlp.down_proj.weight"
    fewer = {name: checksum for name, checksum in scored.items() if name != "lm_head.weight"}
    assert find_difference(fewer, open_weights(tmp_path / "out"), quiet) == "lm_head.weight"


def test_rows_are_taken_while_they_fit_and_of_the_next_one_its_end():
    rows = [{"input_ids": list(range(n)), "labels": [-100] * (n - 2) + [1, 2]} for n in (10, 20, 5)]
    chosen = choose_rows(rows, 16)
    assert [len(row["input_ids"]) for row in chosen] == [10, 6]
    assert chosen[1]["input_ids"] == [14, 15, 16, 17, 18, 19]
    assert chosen[1]["labels"] == [-100, -100, -100, -100, 1, 2]


def test_rows_with_nothing_to_score_are_refused():
    with pytest.raises(ExportError, match="None of the 1 held-out rows has a supervised token"):
        choose_rows([{"input_ids": [1, 2], "labels": [3, -100]}], 16)


def test_rows_beyond_longropes_boundary_are_scored_with_the_long_factors(tmp_path):
    factors = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    base = save_tiny_model(tmp_path / "base", rope_scaling=factors, original_max_position_embeddings=32)
    run = leave_run(tmp_path, base)
    rows = rows_with_ends([60, 20])
    live, targets = logits_of(run.live.eval(), rows)
    assert prove_run(run, rows=rows).of("live").loss == pytest.approx(float(cross_entropy(live, targets)), rel=1e-5)


def test_a_proof_says_that_its_rows_were_trained_on_and_can_be_kept_as_json(tmp_path):
    run = leave_run(tmp_path, save_tiny_model(tmp_path / "base"))
    rows = [{**row, "trained": True} for row in rows_with_ends([30])]
    found = prove_run(run, rows=rows)
    assert found.trained
    assert json.loads(json.dumps(found.as_dict()))["scores"][0]["name"] == "live"


def test_the_share_of_turns_that_end_counts_the_most_likely_tokens(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    run = leave_run(tmp_path, base)
    every = list(range(512))
    assert prove_run(run, stop_ids=every, ontos=["nf4"]).of("nf4").stop_share == 1
    assert prove_run(run, stop_ids=[511], ontos=["nf4"]).of("nf4").stop_share is None

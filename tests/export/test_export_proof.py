"""The figures of a proof are those of the full logits, and separate a faithful export from one that is not."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import random_rows, save_tiny_model
from tiny_run import TinyRun, leave_run
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import Phi3ForCausalLM

from qlora_phi3.adapters.adapter_deltas import read_deltas
from qlora_phi3.errors import ExportError
from qlora_phi3.export import proof as proving
from qlora_phi3.export.merge import ScoredModel, build_models
from qlora_phi3.export.proof import (
    Proof,
    Score,
    choose_onto,
    choose_rows,
    compare_losses,
    find_difference,
    find_fault,
    prove,
)
from qlora_phi3.export.streamed import stream_plain
from qlora_phi3.export.writer import write_shards
from qlora_phi3.family import parse_architecture, read_config
from qlora_phi3.model.weights import open_weights
from qlora_phi3.recipe.schema import Lora

STOP = 7
BOTH = ("nf4", "original")
BF16 = torch.bfloat16


def quiet(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def rows_with_ends(lengths: list[int]) -> list[dict[str, list[int]]]:
    rows = random_rows(lengths)
    for row in rows:
        row["input_ids"][-1] = row["labels"][-1] = STOP
    return rows


ROWS = rows_with_ends([60, 40, 33, 12])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi-3, stored in fp32; read only."""
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> TinyRun:
    """A run in fp32 on that base; read only."""
    return leave_run(tmp_path_factory.mktemp("run"), base)


@pytest.fixture(scope="module")
def run_in_bf16(tmp_path_factory: pytest.TempPathFactory, base: Path) -> TinyRun:
    """A run in bf16 on that base; read only."""
    return leave_run(tmp_path_factory.mktemp("run-bf16"), base, compute_dtype=BF16)


def models_of(run: TinyRun, dtype: Any = torch.float32, **options: Any) -> list[ScoredModel]:
    """The live model of a run and its merges."""
    config = read_config(str(run.base))
    deltas = read_deltas(run.adapter, parse_architecture(config, "tiny"))
    return build_models(run.open_base(), deltas, config, run.adapter, dtype=dtype, **options)


def prove_models(models: list[ScoredModel], run: TinyRun, rows: Any = None, **options: Any) -> Proof:
    """The proof of models on a few rows."""
    architecture = parse_architecture(read_config(str(run.base)), "tiny")
    return prove(models, rows or ROWS, architecture, **{"stop_ids": [STOP], "progress": quiet, **options})


def prove_run(run: TinyRun, dtype: Any = torch.float32, rows: Any = None, ontos: Any = BOTH, **options: Any) -> Proof:
    """The proof of a run's merges."""
    return prove_models(models_of(run, dtype, ontos=ontos), run, rows, **options)


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
def test_the_scores_are_those_of_the_full_logits(run, tmp_path, monkeypatch, tile, piece_bytes):
    monkeypatch.setattr("qlora_phi3.model.weights.ROW_CHUNK_BYTES", piece_bytes)
    monkeypatch.setattr(proving, "TILE_VOCABULARY", tile)
    monkeypatch.setattr(proving, "TILE_POSITIONS", 16)
    rows, merged = ROWS, run.merged(onto="original")
    write_shards(merged, tmp_path / "out", 2**30)
    (tmp_path / "out" / "config.json").write_bytes((run.base / "config.json").read_bytes())
    live, targets = logits_of(run.live.eval(), rows)
    merged_logits, _ = logits_of(Phi3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), rows)
    divergence = kl_div(log_softmax(merged_logits, 1), log_softmax(live, 1), log_target=True, reduction="none").sum(1)

    found = prove_run(run, rows=rows)
    score, nf4 = found.of("original"), found.of("nf4")
    assert (found.rows, found.tokens, found.turns) == (4, len(targets), 4)
    assert found.of("live").loss == pytest.approx(float(cross_entropy(live, targets)), rel=1e-6)
    assert score.loss == pytest.approx(float(cross_entropy(merged_logits, targets)), rel=1e-6)
    assert score.mean_kl == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert score.max_kl == pytest.approx(float(divergence.max()), rel=1e-4)
    assert score.top_agreement == pytest.approx(float((live.argmax(1) == merged_logits.argmax(1)).double().mean()))
    assert score.mean_kl > 1e-4
    assert score.top_agreement < 1
    own = cross_entropy(live, targets, reduction="none")  # of the merge onto NF4 too, to 1e-9 nats
    difference = own - cross_entropy(merged_logits, targets, reduction="none")
    assert found.loss_difference.tokens == len(targets)
    assert found.loss_difference.mean == pytest.approx(nf4.loss - score.loss, rel=1e-9)
    assert found.loss_difference.mean == pytest.approx(float(difference.mean()), rel=1e-3)
    error = float(difference.std()) / len(targets) ** 0.5
    assert found.loss_difference.standard_error == pytest.approx(error, rel=1e-3)


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


def test_fp32_logits_of_a_merge_onto_nf4_agree_to_a_ten_thousandth(run, tmp_path):
    config = read_config(str(run.base))
    rows = rows_with_ends([60, 40])
    write_shards(run.merged(), tmp_path / "out", 2**18)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    live, _ = logits_of(run.live.eval(), rows)
    merged, _ = logits_of(Phi3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), rows)
    assert float((live - merged).norm() / live.norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_merges_of_a_bf16_run_are_faithful_to_what_they_were_made_of(run_in_bf16, dtype):
    found = prove_run(run_in_bf16, dtype)
    for score in found.scores:
        assert find_fault(score, dtype) is None
    assert found.of("original").mean_kl > 100 * found.of("original").fault_mean_kl


def test_a_merge_keeps_the_files_own_embedding_which_is_no_fault_where_the_run_rounded_it(run_in_bf16):
    nf4 = prove_run(run_in_bf16, ontos=["nf4"]).of("nf4")
    assert nf4.fault_mean_kl < 1e-9 < 1e-6 < nf4.mean_kl


def test_a_merge_that_is_not_checked_costs_no_pass_of_its_own_and_has_no_fault(run):
    calls = []
    models = models_of(run, torch.float16, checked=["nf4"])
    found = prove_models(models, run, rows_with_ends([30]), progress=lambda *call: calls.append(call))
    assert calls[:6] == [("Proof: running 3 models, layer by layer", done, 6) for done in range(1, 7)]  # of two layers each
    assert {what for what, _, _ in calls[6:]} == {"Comparing the next tokens, words"}
    assert found.of("original").fault_mean_kl is None
    assert find_fault(found.of("original"), torch.float16) is None


def test_another_base_in_the_files_is_a_fault(run, tmp_path):
    other = leave_run(tmp_path / "2", save_tiny_model(tmp_path / "other", seed=5))
    strange = TinyRun(live=run.live, base=other.base, adapter=run.adapter, record=other.record).merged()
    write_shards(strange, tmp_path / "out", 2**30)
    written = partial(stream_plain, open_weights(tmp_path / "out"), read_config(str(run.base)))
    models = [replace(model, open=written) if model.name == "nf4" else model for model in models_of(run)]
    found = prove_models(models, run, rows_with_ends([60]))
    assert found.of("nf4").mean_kl > 0.1
    assert "KL divergence" in str(find_fault(found.of("nf4"), torch.float16))


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


@pytest.mark.parametrize(
    ("nf4", "original", "mean", "error", "onto"),
    [
        ([2.0, 4.0, 3.0], [1.0, 1.0, 1.0], 2.0, 3**-0.5, "original"),  # differences 1, 3, 2: two errors are 1.155
        ([2.0, 4.0], [1.0, 1.0], 2.0, 1.0, "nf4"),  # differences 1, 3: exactly two errors
        ([1.0, 5.0, 3.0], [1.0, 1.0, 1.0], 2.0, 2 * 3**-0.5, "nf4"),  # differences 0, 4, 2: two errors are 2.309
        ([1.0, 1.0, 1.0], [2.0, 4.0, 3.0], -2.0, 3**-0.5, "nf4"),  # the original is worse
        ([1.0, 1.0], [1.0, 1.0], 0.0, 0.0, "nf4"),
        ([9.0], [1.0], 8.0, None, "nf4"),  # one token has no standard error
    ],
)
def test_the_original_is_chosen_only_where_it_is_better_by_more_than_two_standard_errors(nf4, original, mean, error, onto):
    """0.025 nats over 494 tokens, a fraction of the spread of single tokens, decided before."""
    difference = compare_losses(torch.tensor(nf4).double(), torch.tensor(original).double())
    assert (difference.mean, difference.tokens) == (pytest.approx(mean), len(nf4))
    assert difference.standard_error == (None if error is None else pytest.approx(error))
    scores = (score("live"), score("nf4", loss=1.0), score("original", loss=0.1))
    proof = Proof(rows=1, tokens=1, turns=0, trained=False, scores=scores, loss_difference=difference)
    assert choose_onto(proof) == onto


@pytest.mark.parametrize("onto", BOTH)
def test_where_only_one_merge_is_possible_it_is_chosen(onto):
    scores = (score("live"), score(onto))
    assert choose_onto(Proof(rows=1, tokens=1, turns=0, trained=False, scores=scores)) == onto


def test_a_fault_is_a_mean_or_a_largest_divergence_beyond_the_dtypes_tolerance_or_not_finite():
    assert find_fault(score(mean_kl=1.0), torch.float16) is None
    assert find_fault(score(fault_mean_kl=2e-4), torch.bfloat16) is None
    assert "mean KL" in str(find_fault(score(fault_mean_kl=2e-4), torch.float16))
    assert "the largest KL divergence" in str(find_fault(score(fault_max_kl=0.5), torch.bfloat16))
    assert find_fault(score(fault_mean_kl=float("nan")), torch.float16)


def test_a_file_that_differs_from_what_was_scored_in_one_bit_is_named(run, tmp_path):
    models = models_of(run, torch.float16, ontos=["nf4"])
    prove_models(models, run, rows_with_ends([30]))
    merged, scored, out = run.merged(dtype=torch.float16), models[1].checksums, tmp_path / "out"
    write_shards(merged, out, 2**18)
    assert find_difference(scored, open_weights(out), quiet) is None
    place = open_weights(out).locations["model.layers.1.mlp.down_proj.weight"]
    content = bytearray(place.path.read_bytes())
    content[place.offset + 1] ^= 1
    place.path.write_bytes(content)
    assert "model.layers.1.mlp.down_proj.weight" in find_difference(scored, open_weights(out), quiet)
    fewer = {name: checksum for name, checksum in scored.items() if name != "lm_head.weight"}
    assert "lm_head.weight" in find_difference(fewer, open_weights(out), quiet)


def test_rows_are_taken_while_they_fit_and_of_the_next_one_its_end():
    rows = [{"input_ids": list(range(n)), "labels": [-100] * (n - 2) + [1, 2]} for n in (10, 20, 5)]
    chosen = choose_rows(rows, 16)
    assert [len(row["input_ids"]) for row in chosen] == [10, 6]
    assert chosen[1]["input_ids"] == [14, 15, 16, 17, 18, 19]
    assert chosen[1]["labels"] == [-100, -100, -100, -100, 1, 2]


def test_rows_with_nothing_to_score_are_refused():
    with pytest.raises(ExportError, match="1 held-out rows"):
        choose_rows([{"input_ids": [1, 2], "labels": [3, -100]}], 16)


def test_rows_beyond_longropes_boundary_are_scored_with_the_long_factors(tmp_path):
    factors = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    base = save_tiny_model(tmp_path / "base", rope_scaling=factors, original_max_position_embeddings=32)
    run = leave_run(tmp_path, base)
    rows = rows_with_ends([60, 20])
    live, targets = logits_of(run.live.eval(), rows)
    assert prove_run(run, rows=rows).of("live").loss == pytest.approx(float(cross_entropy(live, targets)), rel=1e-5)


def test_a_proof_states_that_its_rows_were_trained_on(run):
    assert prove_run(run, rows=[{**row, "trained": True} for row in rows_with_ends([30])]).trained


def test_the_share_of_turns_that_end_counts_the_most_likely_tokens(run):
    assert prove_run(run, stop_ids=list(range(512)), ontos=["nf4"]).of("nf4").stop_share == 1
    assert prove_run(run, stop_ids=[511], ontos=["nf4"]).of("nf4").stop_share is None

"""Runs and exports by the command line, on a card that is large enough and on one that is not: `python3 scripts/test_cuda.py`.

The bases are sparse files (memory_bench/base.py). No value is computed: a proof fails always; memory and branches are tested.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from program import MIB, read_json, write_rows

from qlora_phi3.errors import ProofError, UserError
from qlora_phi3.memory.cuda_path import context_bytes

BENCH = Path(__file__).parents[2] / "scripts" / "bench_train.py"
FEW = {"eval_strategy": "no", "max_steps": 2, "batch_size": 2}
#: The plan that needs the least, so that none is searched for.
LEAST = {"checkpoint_every_n_layers": 1, "mlp_tile_tokens": 2048, "micro_batch_tokens": 64}
MULTIPROCESSORS = 28  # of an RTX 3060


def taken(free_mib):
    """MiB that other programs hold where so much is left for a process' tensors."""
    return 11910 - context_bytes(MULTIPROCESSORS) // MIB - free_mib


def folders(shop):
    """Run folders, and what lies beside them."""
    return sorted(path.name for path in (shop.path / "runs").rglob("*") if path.parent.name in ("runs", "mine"))


@pytest.mark.parametrize(("layers", "wsl"), [pytest.param(32, False, marks=pytest.mark.slow), (4, True)])
def test_a_run_takes_what_is_planned_on_a_12_gb_card(workplace, layers, wsl):
    """All layers of Phi-3-mini with segments that grow, and four with segments that do not, under a limit as on WSL."""
    shop = workplace(layers, [2048, 1500] + [64] * 4)
    shop.write(training=FEW, memory={"checkpoint_every_n_layers": min(layers, 8)})
    ended = shop.on_card("run", "mine.toml", wsl=wsl)
    assert ended.exit_code == 0, ended.stderr
    memory, spent = shop.report()["memory"], shop.metrics("train")
    predicted, measured = memory["predicted"], memory["measured"]
    print({name: [kind[name] / MIB for kind in (predicted, measured)] for name in ("allocated_bytes", "reserved_bytes")})
    assert ("Memory: at most" in ended.stdout) == wsl
    assert (shop.metrics("oom"), ended.native, ended.retries) == ([], "", 0)
    assert [step["tokens"] for step in spent] == [spent[0]["tokens"]] * 2
    # A plan assumes full micro-batches; without segments that grow, rests of up to 1 MiB count as allocated.
    assert -0.005 < predicted["allocated_bytes"] / measured["allocated_bytes"] - 1 < 0.02
    # Those that cannot grow are others after the dry run, which returns its own: 1,868 MiB until then, and 1,912 at the end.
    assert -0.03 < predicted["reserved_bytes"] / measured["reserved_bytes"] - 1 < 0.04
    # A run is measured by its peaks with the context, although the allocator has returned memory since the dry run.
    assert measured["allocated_bytes"] >= max(step["peak_memory_bytes"] for step in spent)
    assert measured["on_gpu_bytes"] - measured["reserved_bytes"] == pytest.approx(context_bytes(MULTIPROCESSORS), abs=4096)


@pytest.mark.parametrize(("second", "peak"), [(1950, "later backward"), (1500, "backward")])
def test_a_run_whose_second_micro_batch_finds_gradients_takes_what_is_planned(workplace, monkeypatch, tmp_path, second, peak):
    """Once with a base that is quantized, as is predicted, and once with that base from the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shop = workplace(4, [2048, second] + [64] * 4)
    shop.write(training=FEW, lora={"r": 64}, memory={"checkpoint_every_n_layers": 1, "micro_batch_tokens": 64})
    # A base from the cache lies in memory without holes. What is reserved after the dry run, which returns what it does not use,
    # is then one segment of 20 MiB more or less.
    for bound in (0.01, 0.02):
        ended = shop.on_card("run", "mine.toml")
        assert ended.exit_code == 0, ended.stderr
        assert ("The 4-bit base is read from the cache" in ended.stdout) == (bound == 0.02)
        memory = shop.report()["memory"]
        predicted, measured = memory["predicted"], memory["measured"]
        assert predicted["peak_phase"] == peak
        print({name: [kind[name] / MIB for kind in (predicted, measured)] for name in ("allocated_bytes", "reserved_bytes")})
        assert abs(predicted["allocated_bytes"] / measured["allocated_bytes"] - 1) < 0.001
        assert abs(predicted["reserved_bytes"] / measured["reserved_bytes"] - 1) < bound


@pytest.mark.parametrize("compiler", ["gcc", "false"])
def test_a_run_has_fused_kernels_where_triton_builds_them(workplace, monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    shop = workplace(2, [200] * 6)
    shop.write(training=FEW, memory=LEAST)
    ended = shop.on_card("run", "mine.toml")
    assert ended.exit_code == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if "Kernels:" in line]
    reason = "Triton's call of the C compiler failed; it needs Python's headers (python3-dev)"
    assert lines == [] if compiler == "gcc" else lines[0].endswith(f"Kernels: PyTorch's own, without fused ones: {reason}")
    [plan] = [line for line in ended.stdout.splitlines() if "Plan: " in line]
    assert ("fused kernels" in plan) == (compiler == "gcc")


@pytest.mark.slow
def test_a_card_too_small_for_the_model_ends_a_run_in_one_line_and_leaves_nothing(workplace):
    """In a process of its own, without any of this harness: a model is loaded before any value matters."""
    shop = workplace(4, [500] * 6)
    shop.write(training=FEW, memory=LEAST)
    environment = {**os.environ, "EMU_OTHERS_MIB": str(taken(500))}
    command = [sys.executable, "-m", "qlora_phi3", "run", "mine.toml"]
    ended = subprocess.run(command, cwd=shop.path, env=environment, capture_output=True, text=True, check=False)
    *notes, line = ended.stderr.strip().splitlines()
    assert ended.returncode == UserError.exit_code
    assert line.startswith(f"Error: The memory of cuda:0 ran out while {shop.base} was loaded: CUDA out of memory.")
    assert line.endswith("Close other programs that use it; qlora-phi3 vram-check says what a run needs.")
    assert [note for note in notes if not note.startswith("Note: ")] == []  # torch's C++ code writes no warning of its own
    assert folders(shop) == []


def test_a_card_too_small_for_the_longest_row_ends_a_run_in_the_dry_run(workplace):
    shop = workplace(2, [8000, 200, *[100] * 4])
    shop.write(training=FEW, memory=LEAST)
    ended = shop.on_card("run", "mine.toml", others_mib=taken(900))
    assert ended.exit_code == UserError.exit_code
    assert "This should not fit; qlora-phi3 vram-check suggests what to change." in ended.stderr
    assert "chats.jsonl:1 with its 7,9" in ended.error
    assert "does not fit in the memory of NVIDIA GeForce RTX 3060: step 0 ran out of memory" in ended.error
    assert [record["remedy"] for record in shop.metrics("oom")] == ["again", "tile"]  # all else is the plan's from the start
    assert shop.report()["status"] == "failed"
    assert list((shop.runs()[-1] / "checkpoints").glob("*")) == []


@pytest.mark.slow
def test_an_export_scores_as_many_tokens_as_the_card_has_memory_for(workplace):
    shop = workplace(1, [64] * 8)
    write_rows(shop.path / "held_out.jsonl", [1000 + number for number in range(4)])
    shop.write(training={**FEW, "max_steps": 1}, memory={"rehearsal": False})
    assert shop.on_card("run", "mine.toml").exit_code == 0
    tokens = {}
    for free_mib in (4000, 900, 200):
        words = ("--onto", "nf4", "--out", f"exported{free_mib}")
        ended = shop.on_card("export", str(shop.runs()[-1]), *words, others_mib=taken(free_mib))
        print(free_mib, ended.stdout, ended.stderr)
        if free_mib == 200:
            assert ended.exit_code == UserError.exit_code
            assert ended.error.startswith("Error: The memory of the GPU ran out in the export: CUDA out of memory.")
            assert ended.error.endswith("export on the CPU (CUDA_VISIBLE_DEVICES=-1) or without the proof (--no-verify).")
            continue
        assert ended.exit_code == ProofError.exit_code, ended.stderr
        report = read_json(shop.path / f"exported{free_mib}.failed-proof" / "export_report.json")
        tokens[free_mib] = report["proof"]["tokens"]
    assert not list(shop.path.glob("exported200*"))
    assert tokens[4000] > 3900
    assert 900 < tokens[900] < 1024


@pytest.mark.slow
def test_the_comparison_with_trl_on_a_gpu_runs(base, tmp_path):
    """Here no value is computed, so that our own run ends at its first step, for want of a gradient."""
    chats, table = tmp_path / "chats.jsonl", tmp_path / "table.csv"
    write_rows(chats, [40, 90])

    def compare(program):
        size = ("--model", "microsoft/Phi-3-mini-4k-instruct", "--layers", 2, "--gpu-gib", 6, "--max-length", 256)
        options = ("--base", base, "--data", chats, "--csv", table, "--rounds", 1, "--steps", 2, "--programs", program)
        emulated = os.environ | {"EMU_NONZERO": "200"}  # supervised positions of a row
        command = map(str, (sys.executable, BENCH, *options, *size))
        return subprocess.run(list(command), env=emulated, capture_output=True, text=True, check=False)

    ours, trl = compare("qlora-phi3"), compare("trl")
    assert "The gradient of step 1 is exactly zero" in ours.stdout + ours.stderr
    assert trl.returncode == 0, trl.stdout + trl.stderr
    [row] = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    assert [row["contender"], row["tokens"]] == ["trl", str(2 * 4 * 256)]
    assert 500 * MIB < int(row["peak_memory_bytes"]) <= 6 * 1024 * MIB

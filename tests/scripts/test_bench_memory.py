"""The memory benchmark: its rows, its tables, and that both halves run."""

import re

import pytest
from bench_memory import CPU_GRID, CUDA_GRID, chosen, compare_on_cpu, main, runnable
from memory_bench.cases import Case, mid_size
from memory_bench.rows import (
    COLUMNS,
    GIB,
    PAGE,
    TABLE,
    append_row,
    newest,
    read_rows,
    render_page,
    rows_of_gpu,
    summary,
)

from qlora_phi3.hardware.gpu import find_gpu
from qlora_phi3.memory.report import MemoryReport

TINY = mid_size(2, 256, 512, heads=4, vocab_size=4096, bos_token_id=0, eos_token_id=0)


def test_a_real_step_on_the_cpu_takes_what_is_predicted():
    row = compare_on_cpu(Case(name="tiny", config=TINY, lengths=(200, 90), checkpoint_every=2))
    assert -0.5 <= row["error_percent"] <= 3
    assert row["predicted_phase"] == row["measured_phase"]
    assert (row["rows"], row["checkpoint_every"], row["seen"]) == ("200+90 packed", "2", "unseen")
    assert set(row) <= set(COLUMNS)


def test_the_grids_name_every_configuration_once_and_are_large_enough():
    for grid, fewest in ((CPU_GRID, 60), (CUDA_GRID, 100)):
        assert len({case.name for case in grid}) == len(grid) >= fewest
    assert sum(not case.tuned for case in CPU_GRID) >= 40


@pytest.mark.parametrize("case", [*CPU_GRID, *CUDA_GRID], ids=lambda case: case.name)
def test_a_configuration_is_one_that_a_recipe_can_ask_for(case):
    assert case.recipe.lora.r == case.lora.get("r", 16)
    assert case.execution.micro_batch.max_rows == max(len(case.lengths), len(case.held_out))
    assert case.describe()["configuration"] == case.name


def test_the_figures_in_the_docs_are_those_of_the_table():
    text = PAGE.read_text(encoding="utf-8")
    assert text == render_page(text, read_rows(TABLE)), "run: python scripts/bench_memory.py table"


def test_the_published_rows_keep_the_promise():
    rows = newest(read_rows(TABLE), "cpu")
    errors = [float(row["error_percent"]) for row in rows]
    assert {row["configuration"] for row in rows} == {case.name for case in CPU_GRID}
    assert -0.5 <= min(errors) <= max(errors) <= 3
    assert sum(map(abs, errors)) / len(errors) < 1.5


def test_a_summary_keeps_the_tuned_apart_and_counts_verdicts():
    rows = [
        {"seen": "tuned", "error_percent": "0.5"},
        {"seen": "unseen", "error_percent": "-0.2"},
        {"seen": "unseen", "error_percent": 1.0, "reserved_error_percent": 2},
        {"seen": "unseen", "error_percent": "", "predicted_fits": "yes", "measured_fits": "yes"},
        {"seen": "unseen", "error_percent": None, "predicted_fits": "yes", "measured_fits": "no"},
    ]
    assert [line.strip() for line in summary(rows).splitlines()] == [
        "Tuned: 1 configurations, error +0.50 % to +0.50 %, mean of the absolute errors 0.50 %.",
        "Unseen: 2 configurations, error -0.20 % to +1.00 %, mean of the absolute errors 0.60 %.",
        "Reserved: error +2.00 % to +2.00 %, mean of the absolute errors 2.00 %.",
        "Verdicts under a limit: 1 of 2 right.",
    ]


def test_a_table_keeps_every_row_and_the_newest_counts(tmp_path):
    path = tmp_path / "benchmarks" / "memory.csv"
    usual = {"path": "cpu", "machine": "m", "configuration": "one"}
    for error in (1, 2):
        append_row(path, {**usual, "error_percent": error})
    append_row(path, {**usual, "path": "cuda"})
    assert len(read_rows(path)) == 3
    assert [row["error_percent"] for row in newest(read_rows(path), "cpu")] == ["2"]


MIB = 2**20
GPU = find_gpu("RTX 4060")
#: 100 MiB of model, 60 MiB of step: 160 MiB allocated, served by segments that can grow in steps of 20 MiB.
TRACE = ((1, 100 * MIB), (2, 60 * MIB), (2, 0))
MEMORY = MemoryReport(
    allocated_bytes=160 * MIB,
    peak_phase="forward",
    by_category={},
    by_phase={"load": 100 * MIB, "forward": 160 * MIB},
    resident_bytes=100 * MIB,
    paged_bytes=7,
    trace=TRACE,
)
TRUTH = {
    "phases": {"load": 100 * MIB, "forward": 150 * MIB},
    "reserved_bytes": 160 * MIB,
    "on_gpu_bytes": 300 * MIB,
    "reserved_then_bytes": 160 * MIB,
    "forward_backward_seconds": 0.5,
    "expandable": True,
    "multiprocessors": 34,
    "fits": {str(GIB): True, str(128 * MIB): True},
}


def test_a_gpu_gives_one_row_of_figures_and_one_verdict_for_each_limit():
    free, wide, narrow = rows_of_gpu(CUDA_GRID[0], GPU, MEMORY, TRUTH, 1.0)
    assert (free["error_percent"], free["reserved_error_percent"]) == (6.667, 0.0)
    context = int((8 + 24 + 2.92 * 34) * MIB)
    assert free["predicted_on_card_bytes"] == 160 * MIB + context
    assert free["context_bytes"] == 140 * MIB
    assert free["phases"] == f"load={100 * MIB}/{100 * MIB} forward={160 * MIB}/{150 * MIB}"
    assert (wide["predicted_fits"], wide["measured_fits"], wide["limit_gib"]) == ("yes", "yes", 1)
    assert (narrow["predicted_fits"], narrow["measured_fits"]) == ("no", "yes")


def test_a_configuration_that_does_not_fit_without_a_limit_has_a_row_without_figures():
    nothing = {"phases": {}, "reserved_bytes": 0, "on_gpu_bytes": None, "reserved_then_bytes": 0, "fits": {}}
    nothing |= {"forward_backward_seconds": None, "expandable": False, "multiprocessors": None}
    (row,) = rows_of_gpu(CUDA_GRID[0], GPU, MEMORY, nothing, 1.0)
    assert (row["measured_bytes"], row["error_percent"], row["on_card_error_percent"]) == (None, None, None)
    assert row["predicted_bytes"] == 160 * MIB


def test_a_gpu_without_bfloat16_computes_in_float16():
    assert runnable(CUDA_GRID[0], (7, 5), dry=False).compute == "float16"
    assert runnable(CUDA_GRID[0], (8, 6), dry=False) == CUDA_GRID[0]


def test_without_a_gpu_the_benchmark_stops_with_a_hint(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_memory.py", "cuda"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match=r"bench_memory\.py cuda --dry"):
        main()


def test_a_dry_run_goes_the_way_of_the_gpu_and_runs_out_of_memory_under_the_lowest_limit(tmp_path, monkeypatch, capfd):
    name = "mini 4 unequal padded"
    assert [case.name for case in chosen(CUDA_GRID, [name])] == [name]
    table = tmp_path / "memory.csv"
    monkeypatch.setattr("sys.argv", ["bench_memory.py", "cuda", "--dry", "--only", name, "--csv", str(table)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the program hides the GPU from this process: to be undone
    main()
    shown = capfd.readouterr().out
    assert re.search(rf"{name} +at  4 GiB fits: yes predicted, no measured", shown)
    assert re.search(rf"{name} +at 16 GiB fits: yes predicted, yes measured", shown)
    assert not table.exists()

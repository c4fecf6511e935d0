"""The last lines of an export on the terminal."""

from pathlib import Path
from typing import Any

import pytest

from qlora_phi3.export.run import Exported, GgufResult
from qlora_phi3.ui.console import show_export


class Lines:
    """A view that records its lines."""

    def __init__(self) -> None:
        self.infos: list[str] = []
        self.warnings: list[str] = []

    def info(self, line: str) -> None:
        self.infos.append(line)

    def warning(self, line: str) -> None:
        self.warnings.append(line)


def test_the_lines_for_ollama_are_left_out_where_the_command_prints_its_own():
    assert any(line.startswith("Ollama: ollama create x -f ") for line in shown(quant="q8_0").infos)
    assert not any("ollama create" in line for line in shown(quant="q8_0", for_ollama=True).infos)


def shown(
    *,
    dtype: str = "float16",
    quant: str | None = None,
    stopped: int = 8,
    quant_type: str = "nf4",
    for_ollama: bool = False,
    onto: str = "nf4",
    agreement: float | None = None,
) -> Lines:
    """The end of an export of which so many of 8 answers stopped, or of a GGUF made of it."""
    score = {"loss": 2.0, "mean_kl": 1e-8, "max_kl": 1e-7, "top_agreement": 1.0}
    report: dict[str, Any] = {
        "onto": onto,
        "dtype": dtype,
        "base": {
            "quantization": {"quant_type": quant_type, "double_quant": True},
            "compared": {"differing": [], "codes_differing": [], "num_tensors": 15},
        },
        "proof": {
            "tokens": 9,
            "rows": 2,
            "trained": False,
            "scores": [{"name": "live", **score}, {"name": "nf4", **score}],
        },
        "stop_test": {"method": "generated", "turns": 8, "stopped": stopped, "live_share": None},
    }
    if agreement is not None:
        report["proof"]["scores"].append({"name": "original", **score, "top_agreement": agreement})
    result = quant and GgufResult(path=Path("x.gguf"), quant=quant, notes=("A note.",), system="Be brief.")
    view = Lines()
    show_export(view, Exported(folder=Path("x"), report=report, gguf=result or None), for_ollama=for_ollama)  # type: ignore[arg-type]
    return view


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_table_names_the_quantization_of_the_run(quant_type):
    lines = shown(quant_type=quant_type).infos
    assert [line.split("  ")[0] for line in lines if line.startswith("merged")] == [f"merged onto {quant_type.upper()}"]


@pytest.mark.parametrize(("quant", "dtype"), [(None, "float16"), ("f16", "float16"), ("f32", "bfloat16")])
def test_what_is_written_is_the_merged_model_where_the_files_hold_those_weights(quant, dtype):
    assert "Written: the model merged onto NF4." in shown(quant=quant, dtype=dtype).infos


@pytest.mark.parametrize(("quant", "dtype"), [("q4_k_m", "float16"), ("q8_0", "float32"), ("f16", "bfloat16")])
def test_a_gguf_of_other_weights_is_named_with_what_it_was_made_from(quant, dtype):
    lines = shown(quant=quant, dtype=dtype).infos
    assert f"Written: {quant}, made from the model merged onto NF4; the file itself was not measured." in lines


def test_the_command_to_try_a_gguf_has_the_system_turn():
    assert "Try it: llama-cli -m x.gguf -sys 'Be brief.'" in shown(quant="q8_0").infos


@pytest.mark.parametrize(
    ("onto", "proved"),
    [
        ("nf4", "Proved: the merged model computes what the base and the adapter compute together."),
        (
            "original",
            "Proved: the merged model computes what the original base, on which it was not trained, and the adapter compute "
            "together.",
        ),
    ],
)
def test_where_two_merges_differ_it_is_said_why_and_which_one_was_trained(onto, proved):
    lines = shown(onto=onto, agreement=0.75).infos
    assert "merged onto the original          2.0000  1.0e-08     1.0e-07         75.00 %" in lines
    written = "NF4" if onto == "nf4" else "the original"
    at = lines.index(f"Written: the model merged onto {written}.")
    assert lines[at + 1] == (
        "The adapter was trained on weights rounded to 4 bits: the model merged onto NF4 is the trained one (--onto nf4). The "
        "original's weights are not rounded: there 25.00 % of the most likely tokens are others."
    )
    assert lines[at + 2] == (
        "KL: how far the probabilities of the next token are from the live model's, 0 for equal. Computed in fp32 on 9 tokens of "
        "2 held-out rows; the loss of a run or of eval is that of all held-out rows in the run's dtype."
    )
    assert proved in lines
    assert max(len(line) for line in lines[:at]) <= 80


@pytest.mark.parametrize(("stopped", "warned"), [(0, ["never ended its turn"]), (3, ["in only 3 of 8"]), (4, [])])
def test_a_model_that_does_not_end_its_turns_is_warned_of(stopped, warned):
    view = shown(stopped=stopped)
    assert "Proved: the merged model computes what the base and the adapter compute together." in view.infos
    assert f"Stop test: {stopped} of 8 answers to held-out prompts ended by themselves." in view.infos
    assert len(view.warnings) == len(warned)
    assert all(words in line for words, line in zip(warned, view.warnings, strict=True))

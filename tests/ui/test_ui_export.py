"""The last lines of an export on the terminal."""

from pathlib import Path
from typing import Any

import pytest

from qlora_phi3.export.gguf.write import GgufResult
from qlora_phi3.export.run import Exported
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
    *, dtype: str = "float16", quant: str | None = None, stopped: int = 8, quant_type: str = "nf4", for_ollama: bool = False
) -> Lines:
    """The end of an export of which so many of 8 answers stopped, or of a GGUF made of it."""
    score = {"loss": 2.0, "mean_kl": 1e-8, "max_kl": 1e-7, "top_agreement": 1.0}
    report: dict[str, Any] = {
        "onto": "nf4",
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
    result = quant and GgufResult(path=Path("x.gguf"), quant=quant, notes=("A note.",))
    view = Lines()
    show_export(view, Exported(folder=Path("x"), report=report, gguf=result or None), for_ollama=for_ollama)  # type: ignore[arg-type]
    return view


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_table_names_the_quantization_of_the_run(quant_type):
    lines = shown(quant_type=quant_type).infos
    assert [line.split("  ")[0] for line in lines if line.startswith("> merged")] == [f"> merged onto {quant_type.upper()}"]


@pytest.mark.parametrize(("quant", "dtype"), [(None, "float16"), ("f16", "float16"), ("f32", "bfloat16")])
def test_the_mark_stands_at_what_is_written_where_the_files_hold_those_weights(quant, dtype):
    (line,) = [line for line in shown(quant=quant, dtype=dtype).infos if line.startswith("> ") and "KL from" in line]
    assert line.startswith("> what is written. KL from the live model")


@pytest.mark.parametrize(("quant", "dtype"), [("q4_k_m", "float16"), ("q8_0", "float32"), ("f16", "bfloat16")])
def test_the_mark_stands_at_what_a_gguf_of_other_weights_was_made_from(quant, dtype):
    view = shown(quant=quant, dtype=dtype)
    assert not any("what is written" in line for line in view.infos)
    (line,) = [line for line in view.infos if "KL from" in line]
    assert line.startswith(f"> what {quant} was made from; the file itself was not measured. KL from the live model")


@pytest.mark.parametrize(("stopped", "warned"), [(0, ["never ended its turn"]), (3, ["in only 3 of 8"]), (4, [])])
def test_a_model_that_does_not_end_its_turns_is_warned_of(stopped, warned):
    view = shown(stopped=stopped)
    assert "Proved: the merged model computes what base and adapter compute together." in view.infos
    assert f"Stop test: {stopped} of 8 answers to held-out prompts ended by themselves." in view.infos
    assert len(view.warnings) == len(warned)
    assert all(words in line for words, line in zip(warned, view.warnings, strict=True))

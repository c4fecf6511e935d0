"""The end of an export on the terminal: the table of the proof, and where things lie."""

from collections.abc import Mapping
from typing import Any

from qlora_phi3.export.bundle import is_measured, tell_other_bits
from qlora_phi3.export.run import Exported
from qlora_phi3.export.stop import runaway_warning
from qlora_phi3.ui.console import ConsoleReporter
from qlora_phi3.units import format_count

NAMES = {"live": "live: 4-bit base + adapter", "nf4": "merged onto NF4", "original": "merged onto the original"}


def show_export(view: ConsoleReporter, exported: Exported) -> None:
    """Print the proof and, unless it failed, what to do next."""
    report = exported.report
    if told := tell_other_bits(report):
        view.warning(told)
    if report["proof"]:
        for line in proof_lines(report, quant=None if exported.gguf is None else exported.gguf.quant):
            view.info(line)
    else:
        view.warning("Not held against the trained model (--no-verify).")
    if stops := report["stop_test"]:
        view.info(_stop_line(stops))
        if told := runaway_warning(stops):
            view.warning(told)
    if exported.fault is not None:
        return
    if exported.gguf is not None:
        for note in exported.gguf.notes:
            view.info(note)
        view.info(f"Try it: llama-cli -m {exported.gguf.path}")
        view.info(f"Ollama: ollama create {exported.gguf.path.stem} -f {exported.folder / 'Modelfile'}")
    if exported.page:
        view.info(f"On the hub: {exported.page}")
    view.info(f"Done: {exported.folder.absolute()}")


def proof_lines(report: Mapping[str, Any], *, quant: str | None = None) -> list[str]:
    """The table of an export's proof, for people.

    Args:
        quant: of the GGUF that was made of it, if one was.
    """
    proof = report["proof"]
    rows = "rows that were trained on" if proof["trained"] else "held-out rows"
    header = f"{'':28}{'held-out loss':>14}{'mean KL':>9}{'largest KL':>12}{'same top token':>16}"
    lines = [header]
    for score in proof["scores"]:
        chosen = ">" if score["name"] == report["onto"] else " "
        divergence = (
            ""
            if score["name"] == "live"
            else f"{score['mean_kl']:>9.1e}{score['max_kl']:>12.1e}{score['top_agreement']:>16.2%}"
        )
        lines.append(f"{chosen} {NAMES[score['name']]:26}{score['loss']:>14.4f}{divergence}")
    what = format_count(proof["tokens"], "token")
    written = "what is written."
    if quant is not None and not is_measured(quant, report["dtype"]):
        written = f"what {quant} was made from; the file itself was not measured."
    lines.append(f"> {written} KL from the live model, in nats; {what} of {proof['rows']} {rows}.")
    return lines


def _stop_line(stops: Mapping[str, Any]) -> str:
    if not stops["turns"]:
        return "Stop test: no turn to test."
    how = (
        "answers to held-out prompts ended by themselves"
        if stops["method"] == "generated"
        else "held-out turns would end where they should (a stop id is the most likely token)"
    )
    return f"Stop test: {stops['stopped']} of {stops['turns']} {how}."

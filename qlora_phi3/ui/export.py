"""The end of an export on the terminal: the table of the proof, and where the files are."""

from collections.abc import Mapping
from typing import Any

from qlora_phi3.export.bundle import is_measured, other_bits_warning, score_label
from qlora_phi3.export.run import Exported
from qlora_phi3.export.stop import runaway_warning
from qlora_phi3.ui.console import ConsoleReporter
from qlora_phi3.units import format_count


def show_export(view: ConsoleReporter, exported: Exported) -> None:
    """Print the proof and, unless it failed, what to do next."""
    report = exported.report
    if warning := other_bits_warning(report):
        view.warning(warning)
    if report["proof"]:
        for line in proof_lines(report, quant=None if exported.gguf is None else exported.gguf.quant):
            view.info(line)
    else:
        view.warning("Not compared with the trained model (--no-verify).")
    if stops := report["stop_test"]:
        count = f"{stops['stopped']} of {stops['turns']}"
        if not stops["turns"]:
            view.info("Stop test: no turn to test.")
        elif stops["method"] == "generated":
            view.info(f"Stop test: {count} answers to held-out prompts ended by themselves.")
        else:
            view.info(f"Stop test: at {count} ends of held-out turns a stop id is the most likely token.")
        if warning := runaway_warning(stops):
            view.warning(warning)
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
    """The table of the proof in an export_report.json; `quant` is the type of the GGUF that was made, if one was."""
    proof = report["proof"]
    lines = [f"{'':28}{'held-out loss':>14}{'mean KL':>9}{'largest KL':>12}{'same top token':>16}"]
    for score in proof["scores"]:
        name = score_label(score["name"], report)
        if score["name"] == "live":
            lines.append(f"  {'live: ' + name:26}{score['loss']:>14.4f}")
            continue
        mark = ">" if score["name"] == report["onto"] else " "
        figures = f"{score['mean_kl']:>9.1e}{score['max_kl']:>12.1e}{score['top_agreement']:>16.2%}"
        lines.append(f"{mark} {name:26}{score['loss']:>14.4f}{figures}")
    written = "what is written."
    if quant is not None and not is_measured(quant, report["dtype"]):
        written = f"what {quant} was made from; the file itself was not measured."
    tokens, kind = format_count(proof["tokens"], "token"), "held-out rows"
    if proof["trained"]:
        kind = "rows that were trained on"
    lines.append(f"> {written} KL from the live model, in nats; {tokens} of {proof['rows']} {kind}.")
    return lines

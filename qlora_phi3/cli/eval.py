"""`qlora-phi3 eval`: measure a trained model beside its base, on rows that it was not trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qlora_phi3.cli.options import base_option, check_sampling, complete_run, debug_option, sampling_options, silence_libraries
from qlora_phi3.cli.output import echo
from qlora_phi3.errors import Interrupted, RunError, UserError, printable
from qlora_phi3.units import format_count

#: The figures of the table: name in the JSON, name for a reader, format of a value and of a difference, factor.
FIGURES = (
    ("loss", "Loss", ".4f", 1),
    ("perplexity", "Perplexity", ".2f", 1),
    ("token_accuracy", "Token accuracy, %", ".1f", 100),
    ("exact_match", "Exact match, %", ".1f", 100),
    ("rouge1", "ROUGE-1", ".1f", 1),
    ("rouge2", "ROUGE-2", ".1f", 1),
    ("rougeL", "ROUGE-L", ".1f", 1),
    ("rougeLsum", "ROUGE-Lsum", ".1f", 1),
    ("ended_by_itself", "Ended by itself, %", ".1f", 100),
    ("answer_tokens", "Tokens an answer", ".1f", 1),
)
EXPLANATION = (
    "Loss (of a token, -ln of its probability) and perplexity (e to the loss): lower is better. ROUGE: words shared with the "
    "row's answer, 0 to 100."
)
INTERVALS = " Where the interval has no 0 in it, the difference is more than chance."
#: Of a figure in the JSON.
PARTS = ("base", "tuned", "difference", "low", "high")


@click.command("eval")
@click.argument("run", metavar="RUN", shell_complete=complete_run)
@click.option("--data", metavar="FILE", help="Rows to evaluate on, in any format; by default those that the run held out.")
@click.option("--rows", type=click.IntRange(1), default=100, show_default=True, help="Answers to generate, at most.")
@click.option("--no-generate", is_flag=True, help="Only loss, perplexity and token accuracy.")
@base_option
@sampling_options(256)
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="Of the chosen rows and of what is drawn.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write; by default RUN/eval.json.")
@click.option("--json", "wants_json", is_flag=True, help="Print JSON, for programs.")
@debug_option
def eval(run: str, data: str | None, out: Path | None, base: Path | None, wants_json: bool, **options: Any) -> None:
    """Measure the model of RUN beside its base: loss on held-out rows, and answers compared with those of the rows.

    \b
    Examples:
      qlora-phi3 eval runs/chat/latest
      qlora-phi3 eval chat --data test.jsonl --rows 500
      qlora-phi3 eval chat --rows 500 --temperature 0.3 --top-k 50 --top-p 0.95

    RUN is a run, the name of a recipe (its newest run), a PEFT adapter, an export, or a base. A difference is tuned - base, with
    its 95 % interval. The figures and all answers are written to RUN/eval.json.
    """
    import json
    from importlib.util import find_spec

    from qlora_phi3.files import atomic_write, check_directory
    from qlora_phi3.runfolder import RunFolder, find_model

    wanted = check_sampling(options)
    path = find_model(run)
    folder = RunFolder(path) if RunFolder(path).recipe.is_file() else None
    if folder is None and data is None:
        raise RunError(f"{run} is no run, and so it has no held-out rows.", "Name rows to evaluate on: --data FILE")
    if not options["no_generate"] and find_spec("rouge_score") is None:
        raise UserError("rouge_score is not installed.", "Type: pip install 'qlora-phi3[eval]'; or add --no-generate.")
    if out is None and folder is not None:
        out = folder.path / (f"eval-{Path(data).stem}.json" if data else "eval.json")
    if out is not None:
        check_directory(out, "--out")
    from qlora_phi3.data.sources import open_local
    from qlora_phi3.recipe.load import is_local_data
    from qlora_phi3.ui.live import open_console

    if data is not None and is_local_data(data, Path()):
        open_local(data, Path())  # refuses a missing or empty file
    settings = {name: options[name] for name in ("rows", "max_new_tokens", "seed")}
    settings |= {"rows": 0} if options["no_generate"] else {}
    with open_console(quiet=wants_json) as view:
        try:
            view.progress("Starting torch, transformers and peft", 0, None)
            silence_libraries()
            from qlora_phi3 import evaluation
            from qlora_phi3.inference import load_for_inference, sampling

            view.progress("Starting torch, transformers and peft", 1, 1)
            view.progress("Loading the model", 0, None)
            inference = load_for_inference(path, base=base, progress=view.progress)
            view.progress("Loading the model", 1, 1)
            if data is None and folder is not None:
                chosen = evaluation.read_own_rows(inference, folder, view.progress)
            else:
                chosen = evaluation.read_other_rows(inference, folder, str(data), view.progress)
            how = evaluation.EvalSettings(sampling=sampling(**wanted), **settings)
            result = {"model": str(path), **evaluation.evaluate_model(inference, chosen, how, progress=view.progress)}
        except KeyboardInterrupt as interrupt:
            raise Interrupted("Stopped: nothing was written.", "Start again with the same command.") from interrupt
    text = json.dumps(result, indent=2, ensure_ascii=False)
    if out is not None:
        atomic_write(out, text + "\n", hint="{cause}, or choose another file with --out.")
    if wants_json:
        click.echo(text)
    else:
        _show(result, out)


def _show(result: Mapping[str, Any], out: Path | None) -> None:
    """Print the table, the verdict, and what a reader must know about the rows."""
    from rich.console import Console

    from qlora_phi3.ui.vram import build_table

    data, metrics = result["data"], result["metrics"]
    compared = ("base>", "tuned>", "difference>", "95 % interval>")
    table = build_table("", *(compared if result["has_adapter"] else ("base = tuned>",)))
    for key, name, form, factor in FIGURES:
        if (each := metrics.get(key)) is None:
            continue
        base, tuned, difference, low, high = (each[part] if each[part] is None else factor * each[part] for part in PARTS)
        cells = [format(base, form), format(tuned, form), format(difference, f"+{form}")]
        cells.append("" if low is None else "no difference" if low == high == 0 else f"{low:+{form}} to {high:+{form}}")
        table.add_row(name, *(cells if result["has_adapter"] else cells[1:2]))
    answered = f", {format_count(data['questions'], 'answer')} generated" if data["questions"] else ""
    echo(printable(f"{result['model']} on {format_count(data['rows'], 'row')} ({data['name']}){answered}"))
    echo(printable(result["verdict"]), bold=True)
    Console(highlight=False).print(table)
    echo(EXPLANATION + INTERVALS * any(each["low"] is not None for each in metrics.values()), dim=True, err=True)
    for note in data["notes"]:
        echo(f"Note: {printable(note)}", err=True)
    if out is not None:
        click.echo(printable(f"Written: {out}"))

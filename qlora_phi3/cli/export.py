"""`qlora-phi3 export`: write a run as a model that other programs load, with the proof that it is what was trained."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_phi3.cli.options import complete_run, debug_option, silence_libraries, watching
from qlora_phi3.cli.output import echo, keep_running_without_output
from qlora_phi3.errors import ExportError, Interrupted, UserError, printable, quoted

if TYPE_CHECKING:
    from qlora_phi3.export.request import Request

KIND_HELP = "hf: safetensors for transformers and vLLM; gguf: for llama.cpp and Ollama. [default: hf; gguf with --quant]"
QUANT_HELP = "Type of a GGUF: q8_0, q4_k_m and others; `qlora-phi3 docs gguf` lists them. [default: the type of --dtype]"
DTYPE_HELP = "Of the merged weights, and of a GGUF without --quant."
ONTO_HELP = (
    "Weights that the adapter is added to. nf4: the 4-bit weights it was trained on (NF4 or FP4). original: the base's own. "
    "auto: original where its held-out loss is lower by more than two standard errors, else nf4."
)
OLLAMA_HELP = (
    "Write a GGUF, and create the model NAME in Ollama where it is installed. Without --quant q4_k_m, or q8_0 where llama.cpp's "
    "quantizer is not here."
)
FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("run", metavar="RUN", type=FOLDER, shell_complete=complete_run)
@click.option("--out", type=FOLDER, help="Folder to write; by default RUN/merged, RUN/gguf-q8_0 and so on.")
@click.option("--format", "kind", type=click.Choice(["hf", "gguf"]), help=KIND_HELP)
@click.option("--quant", "quants", multiple=True, metavar="NAME", help=QUANT_HELP)
@click.option("--ollama", metavar="NAME", help=OLLAMA_HELP)
@click.option("--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16", show_default=True, help=DTYPE_HELP)
@click.option("--onto", type=click.Choice(["auto", "nf4", "original"]), default="auto", show_default=True, help=ONTO_HELP)
@click.option("--base", type=FOLDER, help="Folder of the base, if it has moved.")
@click.option("--shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file of weights.")
@click.option("--max-ram", metavar="SIZE", help="Memory to stay within; give it in a container with a memory limit.")
@click.option("--no-verify", is_flag=True, help="Skip the proof and the stop test: on a CPU minutes, also for a small model.")
@click.option("--force", is_flag=True, help="Replace an earlier export; files that no export wrote always stay.")
@click.option("--push", metavar="USER/NAME", help="Then upload to the hub, with a model card.")
@click.option("--private", is_flag=True, help="With --push: only you can see it.")
@debug_option
def export(run: Path, quants: tuple[str, ...], no_verify: bool, **options: Any) -> None:
    """Merge the adapter of RUN into its base, write the model, and compare it with the model that was trained.

    \b
    Examples:
      qlora-phi3 export runs/chat/2026-11-21_10-00-00
      qlora-phi3 export runs/chat/2026-11-21_10-00-00 --format gguf --quant q8_0
      qlora-phi3 export runs/chat/latest --ollama my-phi3
      qlora-phi3 export runs/chat/2026-11-21_10-00-00 --push me/phi3-chat

    RUN is the directory of a run, runs/NAME/latest, or the name of a recipe: its newest run. After an interruption
    the same command uses a complete proof again. Exit codes: 0 proved, 5 written but not what was trained, 2 bad input.
    """
    from qlora_phi3.export import request as requests

    keep_running_without_output()
    if len(quants) > 1:
        raise UserError(f"--quant is given {len(quants)} times ({', '.join(quants)}).", "Give one type a command.")
    name, kind = options["ollama"], options["kind"]
    if name is not None:
        if not requests.OLLAMA_NAME.fullmatch(name):
            hint = "Write [namespace/]name[:tag] of letters, digits, _ - and ., as in --ollama my-phi3:v1"
            raise ExportError(f"--ollama {name} is no name for Ollama.", hint)
        if kind == "hf":
            raise UserError(f"--ollama {name} needs a GGUF, and --format hf writes none.", "Leave --format out.")
        requests.find_finished_run(run, verify=not no_verify)  # before anything that takes long
        quants = quants or (choose_quant(),)
    if quants and kind == "hf":
        hint = "Leave --format out, or use --dtype for safetensors."
        raise UserError(f"--quant {quants[0]} needs a GGUF, and --format hf writes none.", hint)
    options["kind"] = kind or ("gguf" if quants else "hf")
    if options["private"] and not options["push"]:
        raise UserError("--private is given without --push.", "Add --push user/name.")
    request = requests.make_request(run, requests.ExportOptions(quant=next(iter(quants), None), verify=not no_verify, **options))
    if name is not None and request.gguf_file is not None and requests.is_finished_gguf(request):
        echo(f"{request.gguf_file} was made before: only the model in Ollama is created. --force makes the file again.")
        create_in_ollama(name, request.gguf_file.with_name(requests.MODELFILE))
        return

    if kind is None and name is None and request.gguf_file is not None:
        echo(f"--quant {request.quant}: a GGUF is written, as with --format gguf.")
    from qlora_phi3.ui.console import show_export
    from qlora_phi3.ui.live import open_console

    with open_console() as view:
        try:
            view.progress("Starting torch, transformers and peft", 0, None)
            silence_libraries()
            from qlora_phi3.export.run import export_run

            view.progress("Starting torch, transformers and peft", 1, 1)
            exported = export_run(request, view)
            show_export(view, exported, for_ollama=name is not None)
        except KeyboardInterrupt as interrupt:
            raise describe_stop(request) from interrupt
    if exported.fault is not None:
        raise exported.fault
    if name is not None:
        create_in_ollama(name, exported.folder / requests.MODELFILE)


def describe_stop(request: "Request") -> Interrupted:
    """What an interrupted export has left for the next one, and what to type."""
    from qlora_phi3.export.request import find_reusable, has_proof

    if find_reusable(request) is not None:
        return Interrupted(f"Stopped. The merged model is used again: {request.target}", "Continue with the same command.")
    if has_proof(request):
        return Interrupted("Stopped. The proof is complete and is used again.", "Continue with the same command.")
    return Interrupted("Stopped: nothing was written, and the next export begins anew.", "Start again with the same command.")


def choose_quant() -> str:
    """The type for Ollama: q4_k_m, or q8_0 with a note where llama.cpp's quantizer is not here."""
    with watching() as watcher:
        watcher.info("Looking for llama.cpp's quantizer")
        from qlora_phi3.export.gguf.tensors import check_package, find_library

        check_package()
        try:
            find_library("q4_k_m")
        except ExportError as error:
            missing = error
        else:
            return "q4_k_m"
    note = f"{missing} Taking q8_0, 1.7 times as large."
    echo(f"Note: {printable(note)}", err=True)
    return "q8_0"


def create_in_ollama(name: str, modelfile: Path) -> None:
    """Run `ollama create`, whose output is shown as it comes. ExportError where it fails; the export stays."""
    import subprocess

    program = shutil.which("ollama")
    if program is None:
        echo("Ollama is not on this PATH: install it (https://ollama.com/download), then type:")
        click.echo(f"ollama create {name} -f {quoted(modelfile)}\nollama run {name}")
        return
    sys.stdout.flush()
    try:
        code = subprocess.run([program, "create", name, "-f", str(modelfile)], check=False).returncode
    except OSError as error:
        raise ExportError(
            f"{program} cannot be started: {error.strerror}.", f"The export is complete: {modelfile.parent}"
        ) from error
    if code:
        hint = f"The export is complete. Start Ollama (ollama serve), then: ollama create {name} -f {quoted(modelfile)}"
        raise ExportError(f"ollama create {name} ended with exit code {code}.", hint)
    click.echo(f"Chat with it: ollama run {name}")

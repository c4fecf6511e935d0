"""`qlora-phi3 export`: a run as a model that people can use, with the proof that it is what was trained."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_phi3.cli.options import debug_option, silence_libraries
from qlora_phi3.errors import Interrupted, UserError
from qlora_phi3.export.request import DEFAULT_DTYPE, DEFAULT_ONTO, DTYPES

if TYPE_CHECKING:
    from qlora_phi3.export.request import Request
    from qlora_phi3.ui.console import ConsoleReporter


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write; usually RUN/merged, RUN/gguf-q8_0 and the like."
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["hf", "gguf"]),
    default="hf",
    show_default=True,
    help="hf: safetensors for transformers, vLLM and the like; gguf: one file for llama.cpp and Ollama.",
)
@click.option(
    "--quant",
    "quants",
    multiple=True,
    metavar="NAME",
    help="With --format gguf: q8_0, q4_k_m and others; docs/gguf.md has them all. [default: f16, or --dtype's]",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default=DEFAULT_DTYPE,
    show_default=True,
    help="Of merged weights, and of a GGUF without --quant.",
)
@click.option(
    "--onto",
    type=click.Choice(["auto", "nf4", "original"]),
    default=DEFAULT_ONTO,
    show_default=True,
    help="What the adapter is added to: the 4-bit weights it was trained on, or the base's own; auto: the lower held-out loss.",
)
@click.option("--base", type=click.Path(path_type=Path), help="Folder of the base, where it is not where it was.")
@click.option("--shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file of weights.")
@click.option("--max-ram", metavar="SIZE", help="Stay within this much memory.")
@click.option("--no-verify", is_flag=True, help="Leave the proof out (minutes for a full-size model on a CPU).")
@click.option(
    "--force", is_flag=True, help="Replace an earlier export at the target; never files that no export wrote."
)
@click.option("--push", metavar="USER/NAME", help="Upload to the hub afterwards, with a model card.")
@click.option("--private", is_flag=True, help="With --push: for your eyes only.")
@debug_option
@click.pass_context
def export(
    ctx: click.Context,
    run: Path,
    out: Path | None,
    kind: str,
    quants: tuple[str, ...],
    dtype: str,
    onto: str,
    base: Path | None,
    shard_size: str,
    max_ram: str | None,
    no_verify: bool,
    force: bool,
    push: str | None,
    private: bool,
) -> None:
    """Merge the adapter of RUN into its base, write the model, and hold it against what was trained.

    \b
    Examples:
      qlora-phi3 export runs/chat/2026-11-21_10-00-00
      qlora-phi3 export runs/chat/2026-11-21_10-00-00 --format gguf --quant q8_0
      qlora-phi3 export runs/chat/2026-11-21_10-00-00 --push me/phi3-chat

    RUN is a run's folder; of a folder with several runs the newest is taken. An interrupted export goes on where it was with the
    same command. Exit codes: 0 proved, 5 written but not what was trained, 2 bad input.
    """
    if len(quants) > 1:
        raise UserError(f"--quant is given {len(quants)} times ({', '.join(quants)}).", "One file a command.")
    quant = quants[0] if quants else None
    if quant and kind != "gguf":
        raise UserError(f"--quant {quant} is for GGUF.", "Write --format gguf too, or --dtype for safetensors.")
    if private and not push:
        raise UserError("--private says how to push, and nothing is pushed.", "Write --push user/name too.")

    from qlora_phi3.export.request import make_request

    request = make_request(
        run,
        out=out,
        kind=kind,
        quant=quant,
        dtype=dtype,
        onto=onto,
        base=base,
        shard_size=shard_size,
        max_ram=max_ram,
        verify=not no_verify,
        force=force,
        push=push,
        private=private,
    )

    from qlora_phi3.ui.console import LogInterval, open_console

    with open_console(LogInterval("no", 1), plain=False) as view:
        try:
            _export(request, view, quiet=not ctx.meta.get("debug"))
        except KeyboardInterrupt as interrupt:
            raise Interrupted(
                "Stopped. Whole files and a whole proof are kept; the rest begins anew.",
                "Go on with the same command.",
            ) from interrupt


def _export(request: "Request", view: "ConsoleReporter", *, quiet: bool) -> None:
    """Start the libraries, then export, then show."""
    view.progress("Starting torch, transformers and peft", 0, None)
    if quiet:
        silence_libraries()
    from qlora_phi3.export.run import export_run
    from qlora_phi3.ui.export import show_export

    view.progress("Starting torch, transformers and peft", 1, 1)
    exported = export_run(request, view)
    show_export(view, exported)
    if exported.fault is not None:
        raise exported.fault

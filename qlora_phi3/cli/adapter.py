"""`qlora-phi3 adapter`: adapters from one form to another."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qlora_phi3.cli.options import complete_run, debug_option, watching
from qlora_phi3.cli.output import echo
from qlora_phi3.errors import RunError, UserError

if TYPE_CHECKING:
    from qlora_phi3.adapters.convert import Base
    from qlora_phi3.adapters.loralib import Spec
    from qlora_phi3.family import Architecture

T = TypeVar("T", int, float)
#: Options that only some conversions read.
OPTIONS = {
    "peft": ("alpha", "enable", "embedding", "conv2d", "base"),
    "loralib": ("alpha", "enable", "base"),
    "fused": ("base",),
    "split": ("base",),
}


@click.group()
def adapter() -> None:
    """Turn adapters into other forms."""


@adapter.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path), shell_complete=complete_run)
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(list(OPTIONS)), required=True, help="The form of DST.")
@click.option(
    "--alpha",
    multiple=True,
    metavar="[NAME=]ALPHA",
    help="lora_alpha of loralib's layers, of all or of those named NAME. The file does not hold it; loralib's default is 1.",
)
@click.option(
    "--enable", multiple=True, metavar="[NAME=]GROUPS", help="Enabled groups of a MergedLinear: q,v (of qkv_proj) or NAME=1,0,1."
)
@click.option("--embedding", multiple=True, metavar="NAME", help="A loralib Embedding, in addition to embed_tokens.")
@click.option("--conv2d", multiple=True, metavar="NAME=K", help="A loralib Conv2d with kernel size K.")
@click.option("--base", metavar="MODEL", help="Directory or hub id of the model that DST is for.")
@click.option("--force", is_flag=True, help="Replace the adapter at DST.")
@debug_option
def convert(source: Path, target: Path, form: str, force: bool, **given: Any) -> None:
    """Convert the adapter SRC to another form, exactly.

    An adapter that has no exact form of that kind is refused.

    SRC is a PEFT directory, a run, the name of a recipe (its newest run), or a loralib state dict (.pt, .safetensors). fused and
    split are PEFT's: with Phi-3's own qkv_proj and gate_up_proj, or with separate q, k, v, gate and up, as Unsloth has them.

    \b
    Examples:
      qlora-phi3 adapter convert lora.pt my-adapter --to peft --alpha 16 --base microsoft/Phi-3-mini-4k-instruct
      qlora-phi3 adapter convert lora.pt my-adapter --to peft --alpha 16 --enable q,v --base microsoft/Phi-3-mini-4k-instruct
      qlora-phi3 adapter convert runs/chat/2026-11-21_10-00-00 lora.pt --to loralib
      qlora-phi3 adapter convert unsloth-adapter my-adapter --to fused --base microsoft/Phi-3-mini-4k-instruct
      qlora-phi3 adapter convert my-adapter for-unsloth --to split

    scaling * B A of every layer is compared as read and as written; DST is written only if they agree.
    """
    for name, value in given.items():
        if value and name not in OPTIONS[form]:
            raise UserError(f"--{name} has no meaning for --to {form}.", "Leave it out.")
    if not source.is_file() and not (source / "adapter_config.json").is_file():
        from qlora_phi3.runfolder import find_model

        with suppress(RunError):  # what reads it says what it lacks
            source = find_model(str(source))
    with watching() as watcher:
        watcher.info("Starting torch and peft")
        from qlora_phi3.adapters import convert as conversions

        watcher.info(f"Converting {source}")
        if form in ("fused", "split"):
            converted = conversions.change_fusion(source, target, fused=form == "fused", base=given["base"], force=force)
        else:
            base = conversions.read_base(given["base"]) if given["base"] else None
            translate = conversions.loralib_to_peft if form == "peft" else conversions.peft_to_loralib
            converted = translate(source, target, _read_spec(source, form, given, base), base=base, force=force)
    echo(
        f"Checked: scaling * B A of {converted.num_layers} layers, as read and as written: largest relative difference "
        f"{converted.largest_difference:.1e} ({converted.worst_layer})"
    )
    echo("\n".join((*converted.notes, f"Written: {converted.target}")))


def _read_spec(source: Path, form: str, given: Mapping[str, Any], base: "Base | None") -> "Spec":
    from qlora_phi3.adapters.convert import find_base
    from qlora_phi3.adapters.delta import read_enable
    from qlora_phi3.adapters.loralib import Spec
    from qlora_phi3.adapters.peft_io import find_adapter

    def architecture() -> "Architecture":
        if base is None and form == "peft":
            raise UserError("How many groups --enable's letters stand for depends on the base's heads.", "Add --base.")
        return (base or find_base(None, find_adapter(source))).architecture

    return Spec(
        alpha=_read_numbers("alpha", given["alpha"], float),
        enable=read_enable(given["enable"], architecture),
        embedding=Spec().embedding | set(given["embedding"]),
        conv2d=_read_numbers("conv2d", given["conv2d"], int),
    )


def _read_numbers(option: str, texts: Sequence[str], kind: Callable[[str], T]) -> dict[str, T]:
    """[NAME=]VALUE, by name; "" is every layer."""
    values = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            value = kind(number)
        except ValueError:
            value = kind("0")
        if not 0 < float(value) < float("inf") or (option == "conv2d" and not name):
            example = "conv1=3" if option == "conv2d" else "16 or qkv_proj=32"
            raise UserError(f"--{option} {text} cannot be read.", f"Write --{option} {example}, above 0.")
        values[name] = value
    return values

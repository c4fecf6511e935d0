"""The Modelfile with which `ollama create` takes a .gguf file: its template, where it stops, how much it looks back."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_phi3.architecture import read_architecture
from qlora_phi3.errors import ExportError
from qlora_phi3.export.files import GENERATION_CONFIG, read_object
from qlora_phi3.export.gguf_prompt import plan_prompting
from qlora_phi3.export.turns import Turns
from qlora_phi3.model import load_tokenizer
from qlora_phi3.recipe.tables import Model

#: Tokens of context where the model has more; Phi-4's cache then takes 1.6 GiB in 16 bit (40 layers, 10 heads of 128).
LARGEST_CONTEXT = 8192


def write_modelfile(folder: Path, gguf: Path, target: Path, *, force: bool = False) -> Path:
    """Write the Modelfile of a .gguf file that was made from a checkpoint.

    Args:
        folder: the checkpoint.
        gguf: the file, named by its name alone where it lies beside the Modelfile.
        target: the file to write.
        force: replace it.

    Raises:
        ExportError: it is there already, or generation_config.json cannot be read.
        ModelError: the folder's tokenizer or config cannot be read.
    """
    if target.exists() and not force:
        raise ExportError(f"{target} exists.", "Give another place, or --force.")
    tokenizer = load_tokenizer(Model(name=str(folder)))
    prompting = plan_prompting(tokenizer, gguf.stem)
    stop_ids = {*read_stops(folder), *([] if prompting.end_of_turn is None else [prompting.end_of_turn])}
    stops = tokenizer.convert_ids_to_tokens(sorted(stop_ids))
    beside = gguf.resolve().parent == target.resolve().parent
    text = build_modelfile(
        f"./{gguf.name}" if beside else str(gguf.resolve()),
        prompting.turns,
        stops=[stop for stop in stops if stop is not None],
        num_ctx=choose_context(folder),
    )
    target.write_text(text, encoding="utf-8", newline="\n")
    return target


def build_modelfile(source: str, turns: Turns | None, *, stops: Iterable[str], num_ctx: int) -> str:
    """The text of a Modelfile; without `turns` Ollama guesses the template from the one inside the file."""
    template = f'TEMPLATE """{build_template(turns)}"""\n' if turns else ""
    return (
        f"FROM {source}\n"
        + template
        + "".join(f"PARAMETER stop {json.dumps(stop)}\n" for stop in stops)
        + f"PARAMETER num_ctx {num_ctx}\n"
    )


def build_template(turns: Turns) -> str:
    """A chat template in Go's language, for Ollama.

    All white space stands in quotes, so that `{{-` may break lines. As in Ollama's own templates, a conversation whose last
    turn is the assistant's leaves that turn open, to be gone on with.
    """
    branches = {"user": _around(turns.user[0], turns.user[1])}
    if turns.system is not None:
        branches["system"] = _around(*turns.system)
    branches["assistant"] = "{{ .Content }}{{ if not $last }}" + _literal(turns.after_assistant) + "{{ end }}"
    lines = ["{{- range $i, $_ := .Messages }}", "{{- $last := eq (len (slice $.Messages $i)) 1 }}"]
    if turns.opening:
        without = " (ne .Role `system`)" if turns.system is not None else ""
        lines.append(
            "{{- if " + (f"and (eq $i 0){without}" if without else "eq $i 0") + " }}" + _literal(turns.opening)
        )
        lines.append("{{- end }}")
    for number, (role, branch) in enumerate(branches.items()):
        lines.append("{{- " + ("else " if number else "") + f"if eq .Role `{role}` }}}}" + branch)
    return "\n".join([*lines, "{{- end }}", "{{- end }}"])


def _around(before: str, after: str) -> str:
    return _literal(before) + "{{ .Content }}" + _literal(after)


def _literal(text: str) -> str:
    """A text as an action of Go's templates; JSON's escapes are Go's too."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def read_stops(folder: Path) -> list[int]:
    """The ids that generation stops at, by generation_config.json; none where it is not there."""
    path = folder / GENERATION_CONFIG
    stops: Any = read_object(path).get("eos_token_id") if path.is_file() else None
    return [] if stops is None else list(stops) if isinstance(stops, list) else [stops]


def choose_context(folder: Path) -> int:
    """Tokens of context for Ollama; with longrope no more than the short factors serve, for llama.cpp goes by this number."""
    architecture = read_architecture(str(folder))
    return min(architecture.longrope_boundary or LARGEST_CONTEXT, architecture.max_position_embeddings, LARGEST_CONTEXT)

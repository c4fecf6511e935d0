"""Feed damaged files of other people to the functions that read them, and count how each input ends.

    python scripts/fuzz.py                                    # every surface, 200 inputs each
    python scripts/fuzz.py --surface tokenizer --count 5000 --seed 7
    python scripts/fuzz.py --surface tokenizer --seed 7 --only 4711    # one input again, with its traceback

A surface is a function of `Fuzz` that damages something and reads it as a run or `vram-check` does. It ends in a `UserError`
(refused: one line and an exit code), or not at all (accepted); anything else, and an input of more than 20 seconds, is counted as
a traceback, and the script then exits with 1. Add a surface: write the function, and add it to `SURFACES`.
"""

import argparse
import copy
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SECONDS_PER_INPUT = 20
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
#: What a value is replaced by: other types, other sizes, text that no file system and no encoding takes.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**200, 0.5, -1e308, 1e308, float("nan"), float("inf"), "", "x", "true", "-1",
    "auto", "x" * 300, "\x00", "\x1b[31m", "\ud800", "../..", "~nobody/x", "{reason} {0}", [], [1], ["x"], [None],
    [[]], {}, {"x": 1}, {"": None}, {"type": "x"},
)  # fmt: skip


class TooSlow(BaseException):
    """An input that takes more than `SECONDS_PER_INPUT`."""


def unusual(draw: random.Random) -> Any:
    """A copy of one of `VALUES`, as values are changed further."""
    return copy.deepcopy(draw.choice(VALUES))


def nested(depth: int, draw: random.Random) -> Any:
    """Lists or objects in one another."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if draw.random() < 0.5 else {"x": value}
    return value


def damage_json(value: Any, draw: random.Random) -> Any:
    """Replace, delete or wrap one to three values at random places of a JSON value, which is changed."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        holder, key, place = None, None, value
        while isinstance(place, dict | list) and place and (holder is None or draw.random() < 0.8):
            holder, key = place, draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            place = holder[key]
        if holder is None:
            return unusual(draw)
        action = draw.random()
        if action < 0.15:
            del holder[key]
        elif action < 0.25:
            holder[key] = [place] if draw.random() < 0.5 else {"x": place}
        elif action < 0.28:
            holder[key] = nested(draw.choice((50, 900)), draw)
        elif action < 0.33 and isinstance(holder, dict):
            holder[str(draw.choice(VALUES))] = place
        else:
            holder[key] = unusual(draw)
    return value


def damage_bytes(raw: bytes, draw: random.Random, *, within: int | None = None) -> bytes:
    """Flip bits, cut, repeat or insert bytes; all of it in the first `within` bytes."""
    data, end = bytearray(raw), min(len(raw), within or len(raw)) or 1
    action = draw.random()
    if action < 0.5 and data:
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    elif action < 0.7:
        del data[draw.randrange(end) :]
    elif action < 0.8:
        start = draw.randrange(end)
        del data[start : start + draw.choice((1, 4, 100))]
    elif action < 0.9:
        start = draw.randrange(end)
        data[start:start] = draw.choice((b"\x00", b"\xff\xfe", b"{", b'"', b"[" * 2000, bytes(range(256)), data[:200]))
    else:
        pieces = (
            b"",
            b"null",
            b"[" * 5000,
            b'{"a":' * 5000,
            b"version https://git-lfs.github.com/spec/v1\n",
            bytes(64),
        )
        data = bytearray(draw.choice(pieces))
    return bytes(data)


def damage_file(path: Path, draw: random.Random) -> None:
    """Damage a file's JSON, or its bytes."""
    raw = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.75:
        text = json.dumps(damage_json(json.loads(raw), draw), ensure_ascii=draw.random() < 0.9)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(damage_bytes(raw, draw))


@dataclass(frozen=True)
class Fuzz:
    """One input: its random numbers, a copy of the tiny base to damage (`folder`), and the base itself."""

    draw: random.Random
    folder: Path
    base: Path
    adapter: Path  #: Trained on the base, PEFT's format.

    def load(self) -> None:
        """Read and load the damaged base as a run does."""
        import torch

        from qlora_phi3.family import read_architecture, read_config
        from qlora_phi3.memory.simulate import build_skeleton
        from qlora_phi3.model.checkpoint import check_checkpoint
        from qlora_phi3.model.phi3 import load_base
        from qlora_phi3.recipe.schema import Model, Quantization

        name, dtype = str(self.folder), torch.float32
        architecture = read_architecture(name)
        check_checkpoint(name, architecture)
        base, kind = Model(name=name), Quantization()
        build_skeleton(read_config(name), architecture, base, kind, compute_dtype=dtype, longest_row=8)
        model = load_base(base, kind, architecture, compute_dtype=dtype, device=torch.device("cpu"), longest_row=8)
        model(torch.tensor([[3, 4, 5]]))

    def start(self) -> None:
        """Check the damaged adapter as a run and `vram-check` do, and read it as a conversion and an export do."""
        from qlora_phi3.adapters.adapter_deltas import read_deltas
        from qlora_phi3.adapters.peft_io import read_config, read_peft, read_weights
        from qlora_phi3.adapters.start import check_start
        from qlora_phi3.errors import UserError
        from qlora_phi3.family import read_architecture
        from qlora_phi3.recipe.schema import Lora

        refusal = None
        for read in (
            lambda: check_start(self.folder, Lora(r=4), read_architecture(str(self.base))),
            lambda: read_peft(read_weights(self.folder), read_config(self.folder), self.folder),
            lambda: read_deltas(self.folder, read_architecture(str(self.base))),
        ):
            try:
                read()
            except UserError as error:
                refusal = error
        if refusal:
            raise refusal


def config(fuzz: Fuzz) -> None:
    """The model's config.json."""
    damage_file(fuzz.folder / "config.json", fuzz.draw)
    fuzz.load()


def config_keys(fuzz: Fuzz) -> None:
    """The model's config.json with a known key set to an unusual value."""
    from qlora_phi3.family import RANGES, SIZES, SWITCHES

    keys = [
        *SIZES, *RANGES, *SWITCHES, "rope_scaling", "rope_parameters", "sliding_window", "head_dim", "hidden_act", "dtype",
        "model_type", "quantization_config", "pad_token_id", "eos_token_id", "partial_rotary_factor", "architectures",
        "original_max_position_embeddings", "auto_map", "layer_types", "torch_dtype", "id2label", "num_labels",
        "quantization", "attn_implementation",
    ]  # fmt: skip
    path = fuzz.folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    rope = {
        "type": fuzz.draw.choice(("su", "longrope", "yarn", "linear", "default")),
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
    }
    kind = {
        "quant_method": fuzz.draw.choice(("bitsandbytes", "gptq", None)),
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    for key in fuzz.draw.sample(keys, fuzz.draw.choice((1, 1, 2))):
        special = damage_json(rope, fuzz.draw) if key.startswith("rope_") else damage_json(kind, fuzz.draw)
        content[key] = (
            special if key.startswith(("rope_p", "rope_s", "quant")) and fuzz.draw.random() < 0.6 else unusual(fuzz.draw)
        )
    path.write_bytes(json.dumps(content).encode())
    fuzz.load()


def tokenizer(fuzz: Fuzz) -> None:
    """One of the tokenizer's files; then a conversation is tokenized with what was read."""
    from qlora_phi3.data.template import choose_template
    from qlora_phi3.data.tokenizer import load_tokenizer
    from qlora_phi3.recipe.schema import Model

    path = fuzz.folder / fuzz.draw.choice(TOKENIZER_FILES)
    if path.is_file():
        damage_file(path, fuzz.draw)
    else:
        seed = {"<|user|>": 5, "x": 900, "bos_token": {"content": "<s>", "lstrip": False}}
        path.write_text(json.dumps(damage_json(seed, fuzz.draw)), encoding="utf-8", errors="replace")
    loaded = load_tokenizer(Model(name=str(fuzz.folder)))
    choose_template(loaded)


def generation_config(fuzz: Fuzz) -> None:
    """generation_config.json."""
    path = fuzz.folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 5], "do_sample": False, "temperature": 1.0, "_from_model_config": True}))
    damage_file(path, fuzz.draw)
    fuzz.load()


def safetensors(fuzz: Fuzz) -> None:
    """The header of the model's weights, and their end."""
    path = fuzz.folder / "model.safetensors"
    path.write_bytes(damage_header(path.read_bytes(), fuzz.draw))
    fuzz.load()


def damage_header(raw: bytes, draw: random.Random) -> bytes:
    """Damage the JSON of a safetensors header, or bytes in or near it."""
    size = 8 + int.from_bytes(raw[:8], "little")
    if draw.random() < 0.5:
        return damage_bytes(raw, draw, within=size)
    header = json.dumps(damage_json(json.loads(raw[8:size]), draw)).encode()
    return len(header).to_bytes(8, "little") + header + raw[size:]


def index(fuzz: Fuzz) -> None:
    """The index of a checkpoint in several files."""
    names = json.loads((fuzz.folder / "model.safetensors").read_bytes()[8:][: _header_size(fuzz.folder / "model.safetensors")])
    names.pop("__metadata__", None)
    (fuzz.folder / "model.safetensors").rename(fuzz.folder / "a.safetensors")
    path = fuzz.folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "a.safetensors")}))
    damage_file(path, fuzz.draw)
    fuzz.load()


def _header_size(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


def pickles(fuzz: Fuzz) -> None:
    """A loralib state dict, and an adapter as adapter_model.bin."""
    import torch
    from safetensors.torch import load_file

    from qlora_phi3.adapters.loralib import Spec, read_loralib
    from qlora_phi3.adapters.peft_io import read_tensors

    content: Any = {"x.lora_A": torch.ones(4, 8), "x.lora_B": torch.ones(6, 4)}
    if fuzz.draw.random() < 0.3:
        content = fuzz.draw.choice((load_file(fuzz.adapter / "adapter_model.safetensors"), {"state_dict": content}, [1], {1: 2}))
    path = fuzz.folder / "lora.pt"
    torch.save(content, path, _use_new_zipfile_serialization=fuzz.draw.random() < 0.6)
    path.write_bytes(damage_bytes(path.read_bytes(), fuzz.draw))
    read_loralib(read_tensors(path), Spec(alpha={"": 16}), path)


def adapter(fuzz: Fuzz) -> None:
    """adapter_config.json, or the header of adapter_model.safetensors."""
    shutil.rmtree(fuzz.folder)
    shutil.copytree(fuzz.adapter, fuzz.folder)
    if fuzz.draw.random() < 0.6:
        damage_file(fuzz.folder / "adapter_config.json", fuzz.draw)
    else:
        path = fuzz.folder / "adapter_model.safetensors"
        path.write_bytes(damage_header(path.read_bytes(), fuzz.draw))
    fuzz.start()


def recipe(fuzz: Fuzz) -> None:
    """The text of a recipe: the shipped ones, damaged as text and as TOML."""
    from qlora_phi3.recipe.load import load_recipe, recipe_as_toml, resolve_paths

    source = fuzz.draw.choice(sorted((ROOT / "recipes").glob("*.toml")))
    raw, path = source.read_bytes(), fuzz.folder / fuzz.draw.choice(("mine.toml", ".toml", "mine.yaml", "mine.json"))
    if fuzz.draw.random() < 0.3:
        raw = damage_bytes(raw, fuzz.draw)
    else:
        lines = raw.decode().splitlines()
        for _ in range(fuzz.draw.choice((1, 1, 3))):
            at = fuzz.draw.randrange(len(lines))
            key = (
                lines[at].partition("=")[0]
                if "=" in lines[at]
                else fuzz.draw.choice(("x ", "[x]", "[[model]]", "adapter ", "model.x "))
            )
            lines[at] = f"{key}= {toml_value(fuzz.draw)}"
        raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    path.write_bytes(raw)
    loaded = load_recipe(path, check_files=fuzz.draw.random() < 0.5)
    path.with_name("again.toml").write_text(recipe_as_toml(loaded), encoding="utf-8")
    assert load_recipe(path.with_name("again.toml")) == loaded
    resolve_paths(loaded, path.parent)


def overrides(fuzz: Fuzz) -> None:
    """--set values."""
    from qlora_phi3.recipe.load import load_recipe, recipe_as_toml
    from qlora_phi3.recipe.schema import TABLES

    keys = [f"{table}.{key}" for table, model in TABLES.items() for key in model.model_fields]
    keys += [
        "model",
        "x.y",
        "lora.rank_pattern.x",
        "a." * 3000 + "b",
        "",
        ".",
        "lora.",
        "lora..r",
        "training.adam_beta1.x",
    ]
    given = [f"{fuzz.draw.choice(keys)}={toml_value(fuzz.draw)}" for _ in range(fuzz.draw.choice((1, 1, 2)))]
    recipe_as_toml(load_recipe(ROOT / "recipes" / "chat.toml", given, check_files=fuzz.draw.random() < 0.5))


def toml_value(draw: random.Random) -> str:
    """A value as TOML writes it, or nearly."""
    special = (
        "[" * 3000 + "]" * 3000, "[[[[]]]]", "{ a = { b = { c = 1 } } }", "1" * 5000, "0x" + "f" * 5000, "07:32:00",
        "1979-05-27T07:32:00Z", "1e400", "nan", "inf", "-inf", "'~nobody/x'", "'" + "x" * 300 + "'", '"\\u0000"', '"("',
        '"\\u001b[31m"', "'[a-z'", "True", "None", "1\nx = 2", "a" + ".a" * 500, "{}", "['']", "[1, 'x']", "'C:\\x'", "=",
        "#", '"', "'''", "99999999999999999999", "0.1", "-0.0", "'auto'", "auto", "'/dev/null'", "'..'", "'.'", "'a/../b'",
        "'\u202e'", "['all-linear']", "{ '(' = 4 }",
    )  # fmt: skip
    return draw.choice(special)


ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": None,
     "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}], "weight": 1}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a<|end|>", "train": True}], "system": "s"},
    {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]], "context": "c", "tools": "[]"},
    {"prompt": "p", "completion": [{"role": "assistant", "content": "a", "reasoning_content": "t"}], "loss_weight": 1.0},
    {"text": "words<|user|>", "title": "t"},
)  # fmt: skip
#: Keys that a row may have beside its own.
ROW_KEYS = (
    "train", "weight", "masked", "label", "chosen", "kto_tag", "system_prompt", "functions", "images", "parts", "text", "content",
    "thinking", "tool_calls", "function_call", "train_detail", "role", "from", "type", "\ud800", "",
)  # fmt: skip


def damaged_row(draw: random.Random) -> Any:
    """One of the rows above with foreign keys, and with values replaced."""
    row = copy.deepcopy(draw.choice(ROWS))
    for holder in (row, *(item for value in row.values() if isinstance(value, list) for item in value)):
        if isinstance(holder, dict) and draw.random() < 0.3:
            holder[draw.choice(ROW_KEYS)] = unusual(draw)
    return damage_json(row, draw) if draw.random() < 0.8 else row


@cache
def load_undamaged(base: Path) -> tuple[Any, Any]:
    """The tokenizer of the undamaged base, and its template."""
    from qlora_phi3.data.template import choose_template
    from qlora_phi3.data.tokenizer import load_tokenizer
    from qlora_phi3.recipe.schema import Model

    loaded = load_tokenizer(Model(name=str(base)))
    return loaded, choose_template(loaded)


def prepare_rows(fuzz: Fuzz, name: str, **keys: Any) -> None:
    """Read, render and tokenize a file of the damaged folder as a run does."""
    from qlora_phi3.data.prepare import prepare_datasets
    from qlora_phi3.recipe.schema import Data

    loaded, chosen = load_undamaged(fuzz.base)
    os.environ["HF_DATASETS_CACHE"] = str(fuzz.folder / "cache")
    prepare_datasets(
        Data(train=name, **keys),
        max_length=64,
        evaluate=fuzz.draw.random() < 0.2,
        tokenizer=loaded,
        template=chosen,
        base_dir=fuzz.folder,
        progress=lambda *_: None,
    )


def rows(fuzz: Fuzz) -> None:
    """One to three rows, as JSON lines, with foreign keys and unusual values."""
    number = fuzz.draw.choice((1, 1, 2, 3))
    text = "".join(json.dumps(damaged_row(fuzz.draw)) + "\n" for _ in range(number))
    (fuzz.folder / "a.jsonl").write_text(text, encoding="utf-8")
    keys: dict[str, Any] = {"allow_special_tokens": True} if fuzz.draw.random() < 0.2 else {}
    if fuzz.draw.random() < 0.2:
        keys["ignore_columns"] = fuzz.draw.sample(ROW_KEYS[:-2], 3)
    if fuzz.draw.random() < 0.2:
        keys["loss_on"] = "all"
    prepare_rows(fuzz, "a.jsonl", **keys)


def data_files(fuzz: Fuzz) -> None:
    """A data file of any type, damaged as bytes."""
    import gzip

    import pyarrow as pa
    from pyarrow import parquet

    usual = [copy.deepcopy(fuzz.draw.choice((ROWS[0], ROWS[3]))) for _ in range(1)] * 3
    name = fuzz.draw.choice(("a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz"))
    path = fuzz.folder / name
    if name == "a.parquet":
        parquet.write_table(pa.Table.from_pylist(usual), path)
        raw = path.read_bytes()
    elif ".csv" in name or ".tsv" in name:
        raw = ("instruction,output\n" + 'q,"a, b"\n' * 3).replace(",", fuzz.draw.choice(",;\t|")).encode()
    else:
        raw = (json.dumps(usual) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in usual)).encode()
    if fuzz.draw.random() < 0.3 and name != "a.parquet":
        raw = raw.decode().encode("utf-16")
    damaged = damage_bytes(raw, fuzz.draw)
    if name.endswith(".gz"):
        damaged = gzip.compress(damaged) if fuzz.draw.random() < 0.5 else damage_bytes(gzip.compress(raw), fuzz.draw)
    path.write_bytes(damaged)
    prepare_rows(fuzz, name)


def data_cache(fuzz: Fuzz) -> None:
    """The cache of tokenized rows: a damaged entry is made again, and the rows are the same."""
    text = "".join(json.dumps(row) + "\n" for row in [ROWS[0]] * 4)
    (fuzz.folder / "a.jsonl").write_text(text, encoding="utf-8")
    prepare_rows(fuzz, "a.jsonl")
    files = [path for path in (fuzz.folder / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    path = fuzz.draw.choice(sorted(files))
    path.write_bytes(damage_bytes(path.read_bytes(), fuzz.draw))
    prepare_rows(fuzz, "a.jsonl")


def template(fuzz: Fuzz) -> None:
    """The text of a chat template: the published ones, with tokens of Jinja replaced, repeated and deleted."""
    import qlora_phi3.data.template as module
    from qlora_phi3.data.template import choose_template

    module.TEMPLATE_SECONDS = 2

    source = fuzz.draw.choice(sorted((ROOT / "tests" / "data" / "hub_templates").glob("*.jinja")))
    pieces = re.split(r"(\{[{%].*?[%}]\})", source.read_text(encoding="utf-8"), flags=re.DOTALL)
    for _ in range(fuzz.draw.choice((1, 1, 2, 4))):
        at = fuzz.draw.randrange(len(pieces))
        pieces[at] = fuzz.draw.choice(
            ("", "{%", "%}", "{{", "}}", "{% endfor %}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ messages[9]['x'] }}", "| int", "|trim",
             "{% for x in range(9999) %}{% for y in range(9999) %}{% endfor %}{% endfor %}", "{{ 'x' * 99999999999 }}",
             "{% generation %}", "{% endgeneration %}", "{{ raise_exception('no') }}", "{% include 'x' %}", "\ud800", pieces[0])
        )  # fmt: skip
    loaded = copy.deepcopy(load_undamaged(fuzz.base)[0])
    loaded.chat_template = "".join(pieces)
    choose_template(loaded)


SURFACES: dict[str, Callable[[Fuzz], None]] = {
    "rows": rows,
    "data-files": data_files,
    "data-cache": data_cache,
    "template": template,
    "config": config,
    "config-keys": config_keys,
    "tokenizer": tokenizer,
    "generation-config": generation_config,
    "safetensors": safetensors,
    "index": index,
    "pickles": pickles,
    "adapter": adapter,
    "recipe": recipe,
    "overrides": overrides,
}


def build_inputs(place: Path) -> tuple[Path, Path]:
    """A tiny base and an adapter for it, both undamaged."""
    from tiny_run import leave_run
    from workshop import build_base

    from qlora_phi3.recipe.schema import Lora

    base = build_base(place / "base")
    return base, leave_run(place / "run", base, lora=Lora(r=4)).adapter


def run_surface(
    name: str, count: int, seed: int, base: Path, trained: Path, *, only: int | None = None
) -> tuple[Counter[str], list[str]]:
    """Try the inputs of a surface; returns how many were refused, accepted, and ended in a traceback, and those tracebacks."""
    from qlora_phi3.errors import UserError

    def too_slow(*_: object) -> None:
        raise TooSlow

    counts, problems = Counter[str](), list[str]()
    before = signal.signal(signal.SIGALRM, too_slow)
    for number in range(count) if only is None else [only]:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(shutil.copytree(base, Path(place, "base")))
            fuzz = Fuzz(random.Random(f"{seed} {name} {number}"), folder, base, trained)
            signal.alarm(SECONDS_PER_INPUT)
            try:
                SURFACES[name](fuzz)
                counts["accepted"] += 1
            except UserError as error:
                counts["refused"] += 1
                if not str(error).isprintable() and not all(char.isprintable() or char in "\n\t" for char in str(error)):
                    problems.append(f"{name} {number}: a control character in: {str(error)!r}")
            except (Exception, TooSlow) as error:
                counts["traceback"] += 1
                problems.append(f"{name} --only {number}: {''.join(traceback.format_exception(error)[-6:])}")
            finally:
                signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return counts, problems


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surface", choices=SURFACES, action="append", help="default: all")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one input")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    failed = False
    with tempfile.TemporaryDirectory() as place:
        base, trained = build_inputs(Path(place))
        print(f"{'surface':<20}{'inputs':>8}{'refused':>9}{'accepted':>10}{'tracebacks':>12}{'seconds':>9}", flush=True)
        for name in options.surface or SURFACES:
            started = time.perf_counter()
            counts, problems = run_surface(name, options.count, options.seed, base, trained, only=options.only)
            row = f"{name:<20}{counts.total():>8}{counts['refused']:>9}{counts['accepted']:>10}{counts['traceback']:>12}"
            print(f"{row}{time.perf_counter() - started:>9.0f}", flush=True)
            print("".join(f"\n{problem}" for problem in problems[:10]), file=sys.stderr, flush=True)
            failed = failed or bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

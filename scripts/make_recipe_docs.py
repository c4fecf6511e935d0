"""Write docs/recipe.md from the schema of the recipe: `python scripts/make_recipe_docs.py`."""

from pathlib import Path

from qlora_phi3.recipe.edit import format_toml
from qlora_phi3.recipe.load import recipe_schema
from qlora_phi3.recipe.schema import TABLES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipe.md"
HEAD = """# Every key of a recipe

Made from the program by `scripts/make_recipe_docs.py`; `qlora-phi3 recipe schema` prints the same for an editor. Names are those
of LoraConfig (`[lora]`), BitsAndBytesConfig (`[quantization]`), TrainingArguments and SFTConfig (`[training]`). `batch_size`, the
rows of an optimizer step, `save_minutes`, `recover_from_divergence`, and the keys of `[data]` and `[memory]` are our own.

A relative path in `[model]` or `[data]` is looked for in the folder of the recipe, then in the working directory. `output_dir` is
relative to the working directory.
"""
TAIL = """
## Divergence

A step diverges if its loss or its gradient is not finite; if its gradient norm before clipping is more than 1,000 times the
largest of the run so far, and more than 1,000; or if it is the fifth in a row whose loss is more than 1 nat above the largest
loss of the run's first 20 steps and of all steps more than 20 steps ago. The last two begin after 20 steps. A step whose loss
is high once, as with a hard row in a small batch, is trained as usual.

With `recover_from_divergence`, the adapter and the optimizer go back to a copy of the last good step (at most five steps before
the first suspicious one), and the learning rate is halved from there on. The step counter goes on: the rows of the steps that
diverged are skipped in this epoch, and what the steps between the copy and them had learned is undone. metrics.jsonl and
report.json list the event with the rows. After five recoveries the next divergence ends the run with exit code 2; its last good
state is the newest checkpoint and the adapter. The copy needs computer memory, not GPU memory: trained parameters times 4
bytes, plus the state of the optimizer (8 bytes with `adamw_torch`, 2 with 8-bit AdamW). A checkpoint holds it too, and is about
twice as large.

## Early stopping

With `early_stopping_patience = 3` training ends at the third evaluation in a row whose loss is not lower than the lowest before,
and the adapter of the lowest is saved, also where training goes on to its last step. It lies in the computer's memory (trained
parameters times 4 bytes) and in every checkpoint, so that a resumed run ends in the same adapter; no checkpoint of that step is
needed. The evaluation before the first step does not count. report.json has the reason ("stopped early after step 120; best step
90"), and its `eval_loss_after` is that of the saved adapter. With `load_best_model_at_end` as well, the result is the same.

## Starts that change the base

PiSSA, OLoRA and CorDA move a part of each weight into the adapter and keep the rest, which is quantized anew in 4 bit. PEFT 0.21
refuses PiSSA on 4-bit weights, and OLoRA quantizes what is left again. The adapter then fits neither the base's own files nor the
4-bit base that others load, so that no export could be compared with what was trained: `init_lora_weights` refuses these names.
`"loftq"` has the same aim, a smaller error of quantization at the start, and leaves the base as it is: an ordinary LoRA, to be
merged onto the 4-bit weights (`--onto nf4`; `auto` measures it). On the unquantized base it would correct what is not wrong there.

## Trackers

`report_to = "tensorboard"`, `"wandb"`, `"mlflow"`, `"trackio"` or a list: `pip install 'qlora-phi3[wandb]'` and so on. They get
loss, learning rate, gradient norm, tokens a second and the held-out loss, with the step, from before the first step to after the
last. A resumed run goes on under its name, `<recipe>-<time>`. TensorBoard writes to `tensorboard/` in the run folder; the others go
to the project `qlora-phi3` unless the environment names another (`WANDB_PROJECT`, `MLFLOW_EXPERIMENT_NAME`). A tracker that is
not installed, or cannot start, is an error before the first step; one that fails later is left out with a note. The settings that
transformers sends go along, the paths of the base and of the run among them, and no token. What the run prints is not sent.
"""


def render_page() -> str:
    """The page as Markdown: a table of key, default and meaning for each table of the recipe."""
    parts = [HEAD]
    definitions = recipe_schema()["$defs"]
    for table, model in TABLES.items():
        described = definitions[model.__name__]
        parts.append(f"\n## [{table}]\n\n{described['description']}\n\n| key | default | meaning |\n|---|---|---|\n")
        for key, field in model.model_fields.items():
            if field.is_required():
                default = "must be given"
            elif field.default_factory is not None or field.default is None:
                default = ""
            else:
                default = f"`{format_toml(model.model_construct().model_dump()[key])}`"
            meaning = described["properties"][key].get("description", "").replace("|", "\\|")
            parts.append(f"| `{key}` | {default} | {meaning} |\n")
    return "".join([*parts, TAIL])


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8", newline="\n")

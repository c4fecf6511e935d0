"""The program itself, `qlora-phi3 run`, on a recipe written here. One contender of bench_train.py.

With `--record` nothing is trained: the rows in the order they would be trained in, and the adapter as it would start,
are written for the other contenders, and the process ends.
"""

import json
from pathlib import Path
from typing import Any

import click
from common import argument_parser, pin, step_clock, write_result

parser = argument_parser()
parser.add_argument("--data", type=Path, required=True, help="conversations, as [data] train takes them")
parser.add_argument("--max-rows", type=int, default=80)
parser.add_argument("--record", action="store_true", help="write --rows and --adapter, and train nothing")
arguments = parser.parse_args()
pin(arguments)

RECIPE = """
[model]
name = {base}
[quantization]
load_in_4bit = {load_in_4bit}
bnb_4bit_compute_dtype = {compute}
[lora]
r = 16
lora_alpha = 16
[data]
train = {data}
max_rows = {max_rows}
[training]
batch_size = {batch_size}
max_length = {max_length}
learning_rate = 2e-4
lr_scheduler_type = "constant"
gradient_checkpointing = {checkpointing}
do_eval = false
save_strategy = "no"
disable_tqdm = true
seed = 42
output_dir = {output}
"""
ON_GPU = """
optim = "adamw_8bit"
[memory]
budget = "{gpu_gib}GiB"
"""


def write_recipe() -> Path:
    """The recipe of this contender, in the work folder."""
    text = RECIPE.format(
        base=json.dumps(str(arguments.base)),
        load_in_4bit=json.dumps(arguments.quantization == "nf4"),
        compute=json.dumps(arguments.compute),
        data=json.dumps(str(arguments.data)),
        max_rows=arguments.max_rows,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        checkpointing=json.dumps({"on": True, "off": False}.get(arguments.checkpointing, "auto")),
        output=json.dumps(str(arguments.work / "runs")),
    )
    if arguments.gpu_gib:
        text += ON_GPU.format(gpu_gib=arguments.gpu_gib)
    path = arguments.work / "bench.toml"
    path.write_text(text, encoding="utf-8")
    return path


def record(model: Any, train_dataloader: Any) -> None:
    """Write the rows in the order of the steps, and the adapter before the first of them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    dataset = train_dataloader.dataset
    order = [index for step in train_dataloader.batch_sampler for index in step]
    with arguments.rows.open("w", encoding="utf-8") as file:
        for index in order:
            row = dataset[index]
            labels = [-100, *row["labels"][1:]]  # nothing predicts a row's first token
            file.write(json.dumps({"input_ids": list(row["input_ids"]), "labels": labels}) + "\n")
    arguments.adapter.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(state, str(arguments.adapter / "adapter_model.safetensors"))


def watch(clock: Any) -> None:
    """Have every Trainer of this process carry the clock; in `--record` mode, end the process where training begins."""
    from transformers import TrainerCallback, trainer

    class Record(TrainerCallback):
        def on_train_begin(self, *_args: Any, **kwargs: Any) -> None:
            record(kwargs["model"], kwargs["train_dataloader"])
            raise SystemExit(0)

    trainer.DEFAULT_CALLBACKS.append(Record() if arguments.record else clock)


def main() -> None:
    """Run the command line in this process, so that its high-water mark is measured like everyone's."""
    recipe = write_recipe()
    clock = step_clock(arguments)
    watch(clock)
    from qlora_phi3.cli.main import main as command

    try:
        command(["run", str(recipe)])
    except (SystemExit, click.exceptions.Exit) as ended:
        if ended.args and ended.args[0] not in (0, None):
            raise
    if not arguments.record:
        write_result(arguments, "qlora-phi3", clock)


main()

"""Unsloth by its own path, on rows tokenised beforehand. One contender of bench_train.py."""

from common import device_settings, limit_torch, load_initial_adapter, read_arguments, read_rows, step_clock, write_result

arguments = read_arguments()

import unsloth  # noqa: E402, F401, I001  (Unsloth wants to be imported before the libraries it patches)
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402
from unsloth import FastLanguageModel  # noqa: E402

limit_torch(arguments)
model, tokenizer = FastLanguageModel.from_pretrained(
    str(arguments.base),
    dtype=getattr(torch, arguments.compute),
    load_in_4bit=arguments.quantization == "nf4",
    max_seq_length=arguments.max_length,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    lora_alpha=16,
    lora_dropout=0.0,
    target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    use_gradient_checkpointing="unsloth" if arguments.checkpointing == "on" else False,
    random_state=42,
)
load_initial_adapter(model, arguments.adapter)
clock = step_clock(arguments)
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    args=SFTConfig(
        output_dir=str(arguments.work),
        bf16=arguments.compute == "bfloat16",
        fp16=False,
        num_train_epochs=1,
        max_length=arguments.max_length,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=arguments.checkpointing == "on",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=42,
        **device_settings(arguments),
    ),
    train_dataset=Dataset.from_list(read_rows(arguments.rows)),
    callbacks=[clock],
)
trainer.train()
write_result(arguments, "unsloth", clock)

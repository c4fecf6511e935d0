"""TRL's SFTTrainer as `trl sft` builds it, on rows tokenised beforehand. One contender of bench_train.py."""

import torch
from common import device_settings, limit_torch, load_initial_adapter, read_arguments, read_rows, step_clock, write_result

arguments = read_arguments()
limit_torch(arguments)

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import BitsAndBytesConfig  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

compute = getattr(torch, arguments.compute)
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
)
clock = step_clock(arguments)
trainer = SFTTrainer(
    model=str(arguments.base),
    args=SFTConfig(
        output_dir=str(arguments.work),
        model_init_kwargs={"dtype": "bfloat16" if arguments.gpu_gib else "float32"},
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
    quantization_config=quantization if arguments.quantization == "nf4" else None,
    peft_config=LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[clock],
)
load_initial_adapter(trainer.model, arguments.adapter)
trainer.train()
write_result(arguments, "trl", clock)

"""The grids of scripts/bench_memory.py: on a CPU mid-size models with every option, on a GPU complete Phi-3s.

Activation offloading is left to the GPU: torch pins the memory it copies to, and without a GPU it cannot pin any.
"""

from dataclasses import replace
from typing import Any

from memory_bench.cases import Case, longrope, mid_size

from qlora_phi3.family import known_config

USUAL = mid_size()  # 92 M parameters
SMALL = mid_size(4, 512, 1536, vocab_size=16384)  # 30 M
GROUPED = mid_size(4, 640, 1728, heads=10, groups=2, vocab_size=16384)  # 38 M
DEEP = mid_size(8, 512, 1408, groups=4, vocab_size=8192)  # 33 M
WIDE = mid_size(2, 1536, 4096, heads=16, groups=4, vocab_size=16384)  # 98 M
TIED = mid_size(4, 768, 2048, heads=12, groups=4, vocab_size=100352, tie_word_embeddings=True)  # 102 M
WINDOW = mid_size(4, 512, 1536, vocab_size=16384, sliding_window=256)
LONG = mid_size(4, 512, 1536, vocab_size=16384, **longrope(64, 256))
PARTIAL = mid_size(4, 512, 1536, groups=2, vocab_size=32064, tie_word_embeddings=True, **longrope(64, 256, 0.75))

#: The ten that the simulation was written with.
TUNED = (
    Case(name="checkpointing", config=USUAL, tuned=True),
    Case(name="no checkpointing", config=USUAL, checkpoint_every=0, tuned=True),
    Case(name="fp32", config=USUAL, compute="float32", tuned=True),
    Case(name="padded", config=USUAL, lengths=(512, 300, 200), packing=False, tuned=True),
    Case(name="several packed", config=USUAL, lengths=(512, 300, 200), tuned=True),
    Case(name="dropout", config=USUAL, lora={"lora_dropout": 0.1}, tuned=True),
    Case(name="unquantized", config=USUAL, quantization={"load_in_4bit": False}, tuned=True),
    Case(name="grouped queries", config=mid_size(groups=2), tuned=True),
    Case(name="8-bit Adam", config=USUAL, optim="paged_adamw_8bit", tuned=True),
    Case(name="large vocabulary", config=mid_size(vocab_size=100352), tuned=True),
)

OTHERS = (
    # lengths and rows
    Case(name="1 x 64", config=SMALL, lengths=(64,)),
    Case(name="1 x 1024", config=SMALL, lengths=(1024,)),
    Case(name="1 x 2048", config=SMALL, lengths=(2048,)),
    Case(name="1 x 1500, heads of 96", config=WIDE, lengths=(1500,)),
    Case(name="8 x 128 packed", config=GROUPED, lengths=(128,) * 8),
    Case(name="8 x 128 padded", config=GROUPED, lengths=(128,) * 8, packing=False),
    Case(name="4 unequal, padded", config=GROUPED, lengths=(400, 333, 120, 57), packing=False),
    Case(name="4 unequal, packed", config=GROUPED, lengths=(400, 333, 120, 57)),
    Case(name="one long among short ones", config=SMALL, lengths=(1000, 40, 30, 20, 10)),
    Case(name="uneven length", config=SMALL, lengths=(777,)),
    # shapes
    Case(name="deep", config=DEEP),
    Case(name="wide", config=WIDE),
    Case(name="tied embeddings", config=TIED),
    Case(name="longrope, short row", config=LONG, lengths=(200,)),
    Case(name="longrope, long row", config=LONG, lengths=(600,)),
    Case(name="partial rotary, tied, grouped", config=PARTIAL, lengths=(300, 280)),
    Case(name="window not reached", config=WINDOW, lengths=(200, 250)),
    Case(name="window reached, packed", config=WINDOW, lengths=(600,)),
    Case(name="window reached by one of three", config=WINDOW, lengths=(400, 200, 100)),
    Case(name="window reached, padded", config=WINDOW, lengths=(500, 300), packing=False),
    Case(name="window reached, one padded row", config=WINDOW, lengths=(500,), packing=False),
    # recomputation and offloading
    Case(name="every 2nd layer recomputed", config=DEEP, lengths=(700,), checkpoint_every=2),
    Case(name="every 4th layer recomputed", config=DEEP, lengths=(700,), checkpoint_every=4),
    Case(name="every 2nd layer, dropout", config=DEEP, checkpoint_every=2, lora={"lora_dropout": 0.05}),
    Case(name="none recomputed, grouped", config=GROUPED, checkpoint_every=0),
    Case(name="none recomputed, padded", config=GROUPED, checkpoint_every=0, lengths=(300, 200), packing=False),
    Case(name="none recomputed, long", config=SMALL, checkpoint_every=0, lengths=(1400,)),
    # the MLP in tiles
    Case(name="MLP in tiles", config=SMALL, lengths=(2048,), mlp_tile_tokens=256),
    Case(name="MLP in uneven tiles, dropout", config=WIDE, lengths=(1500,), mlp_tile_tokens=400, lora={"lora_dropout": 0.1}),
    Case(name="MLP in tiles, padded, nothing else recomputed", config=GROUPED, lengths=(400, 333, 120), packing=False,
         mlp_tile_tokens=256, checkpoint_every=0),
    # precision and quantization
    Case(name="fp32, no checkpointing", config=SMALL, compute="float32", checkpoint_every=0),
    Case(name="fp32, padded, grouped", config=GROUPED, compute="float32", lengths=(300, 200), packing=False),
    Case(name="fp32, long", config=SMALL, compute="float32", lengths=(1200,)),
    Case(name="fp16", config=SMALL, compute="float16", lengths=(256,)),
    Case(name="FP4", config=GROUPED, quantization={"bnb_4bit_quant_type": "fp4"}),
    Case(name="no double quantization", config=WIDE, quantization={"bnb_4bit_use_double_quant": False}),
    Case(name="FP4, no double quantization", config=DEEP, lengths=(300,),
         quantization={"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
    Case(name="unquantized, fp32", config=SMALL, compute="float32", quantization={"load_in_4bit": False}),
    Case(name="unquantized, no checkpointing", config=DEEP, checkpoint_every=0, quantization={"load_in_4bit": False}),
    # the adapter
    Case(name="rank 4", config=DEEP, lora={"r": 4}),
    Case(name="rank 64", config=DEEP, lora={"r": 64}),
    Case(name="rank 256", config=SMALL, lora={"r": 256}, optim="adamw_8bit"),
    Case(name="rank-stabilised", config=GROUPED, lora={"r": 32, "use_rslora": True}),
    Case(name="DoRA", config=SMALL, lora={"use_dora": True}),
    Case(name="DoRA, no checkpointing", config=GROUPED, lora={"use_dora": True}, checkpoint_every=0),
    Case(name="DoRA, dropout", config=SMALL, lora={"use_dora": True, "lora_dropout": 0.1}),
    Case(name="attention only", config=DEEP, lora={"target_modules": ["qkv_proj", "o_proj"]}),
    Case(name="down only", config=GROUPED, lora={"target_modules": ["down_proj"]}),
    Case(name="two layers of eight", config=DEEP, lora={"layers_to_transform": [6, 7]}),
    Case(name="another rank for one name", config=SMALL, lora={"rank_pattern": {"down_proj": 64}}),
    Case(name="head trained in full", config=SMALL, lora={"modules_to_save": ["lm_head"]}),
    Case(name="head and embedding in full", config=DEEP, lora={"modules_to_save": ["lm_head", "embed_tokens"]}),
    Case(name="head in full, 8-bit Adam", config=GROUPED, lora={"modules_to_save": ["lm_head"]}, optim="adamw_8bit"),
    # the optimizer and what surrounds a step
    Case(name="fused AdamW", config=DEEP, optim="adamw_torch_fused", lora={"r": 64}),
    Case(name="8-bit AdamW, rank 64", config=DEEP, optim="adamw_8bit", lora={"r": 64}),
    Case(name="paged 32-bit AdamW", config=GROUPED, optim="paged_adamw_32bit", lora={"r": 64}),
    Case(name="without accumulation", config=DEEP, accumulates=False, lora={"r": 64}),
    Case(name="without evaluation", config=SMALL, evaluation_lengths=()),
    Case(name="longer rows held out", config=SMALL, lengths=(200,), evaluation_lengths=(1500,)),
    Case(name="tile of 2 MiB", config=TIED, lengths=(300,), tile_mib=2),
    Case(name="tile of 128 MiB", config=SMALL, lengths=(1800,), tile_mib=128),
    Case(name="eager attention", config=SMALL, attention="eager", lengths=(300, 200)),
    Case(name="eager attention, grouped, no checkpointing", config=GROUPED, attention="eager", checkpoint_every=0,
         lengths=(300,), packing=False),
)  # fmt: skip

#: The simulation was mended after their first figures.
MENDED = {
    "DoRA", "DoRA, no checkpointing", "DoRA, dropout", "head trained in full", "head and embedding in full",
    "head in full, 8-bit Adam", "rank 256", "tied embeddings",
}  # fmt: skip
CPU_GRID = TUNED + tuple(replace(case, tuned=case.name in MENDED) for case in OTHERS)

MINI, MEDIUM, PHI_4_MINI = (
    "microsoft/Phi-3-mini-128k-instruct",
    "microsoft/Phi-3-medium-128k-instruct",
    "microsoft/Phi-4-mini-instruct",
)
#: Their window of 2,047 tokens is reached by longer rows, which rules the flash kernel out.
MINI_4K, MEDIUM_4K = "microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-medium-4k-instruct"
MINI_3_5, PHI_4, REASONING = "microsoft/Phi-3.5-mini-instruct", "microsoft/phi-4", "microsoft/Phi-4-reasoning"


def _full(name: str, model: str, *lengths: int, optim: str = "paged_adamw_8bit", **more: Any) -> Case:
    return Case(name=name, config=known_config(model) or {}, lengths=lengths, optim=optim, **more)


CUDA_GRID = (
    _full("mini 1 x 512", MINI, 512),
    _full("mini 1 x 1024", MINI, 1024),
    _full("mini 1 x 2048", MINI, 2048),
    _full("mini 1 x 4096", MINI, 4096),
    _full("mini 1 x 8192", MINI, 8192),
    _full("mini 1 x 16384", MINI, 16384),
    _full("mini 1 x 2048 offloading", MINI, 2048, offloading=True),
    _full("mini 1 x 8192 offloading", MINI, 8192, offloading=True),
    _full("mini 1 x 16384 offloading", MINI, 16384, offloading=True),
    _full("mini 1 x 40960 offloading", MINI, 40960, offloading=True),
    _full("mini 1 x 4096 offloading, MLP in tiles", MINI, 4096, offloading=True, mlp_tile_tokens=1024),
    _full("mini 1 x 16384 offloading, MLP in tiles", MINI, 16384, offloading=True, mlp_tile_tokens=1024),
    _full("mini 1 x 2048 without checkpointing", MINI, 2048, checkpoint_every=0),
    _full("mini 1 x 2048 every 2nd layer", MINI, 2048, checkpoint_every=2),
    _full("mini 1 x 2048 every 4th layer", MINI, 2048, checkpoint_every=4),
    _full("mini 4 x 512 packed", MINI, *[512] * 4),
    _full("mini 4 x 512 padded", MINI, *[512] * 4, packing=False),
    _full("mini 4 unequal padded", MINI, 1000, 700, 400, 100, packing=False),
    _full("mini 4 unequal packed", MINI, 1000, 700, 400, 100),
    _full("mini 16 x 512 packed", MINI, *[512] * 16),
    _full("mini 4k 1 x 2048, window reached", MINI_4K, 2048),
    _full("mini 4k 1 x 4096, window reached", MINI_4K, 4096),
    _full("mini 1 x 2048 rank 64", MINI, 2048, lora={"r": 64}),
    _full("mini 1 x 2048 rank 64 adamw_torch", MINI, 2048, lora={"r": 64}, optim="adamw_torch"),
    _full("mini 1 x 2048 adamw_8bit", MINI, 2048, optim="adamw_8bit"),
    _full("mini 1 x 2048 paged_adamw_32bit", MINI, 2048, optim="paged_adamw_32bit"),
    _full("mini 1 x 2048 dropout", MINI, 2048, lora={"lora_dropout": 0.05}),
    _full("mini 1 x 2048 DoRA", MINI, 2048, lora={"use_dora": True}),
    _full("mini 1 x 2048 head in full", MINI, 2048, lora={"modules_to_save": ["lm_head"]}),
    _full("mini 1 x 2048 no double quant", MINI, 2048, quantization={"bnb_4bit_use_double_quant": False}),
    _full("mini 1 x 2048 unquantized", MINI, 2048, quantization={"load_in_4bit": False}),
    _full("mini 1 x 2048 fp32", MINI, 2048, compute="float32"),
    _full("mini 1 x 2048 tile of 256 MiB", MINI, 2048, tile_mib=256),
    _full("Phi-4-mini 1 x 2048", PHI_4_MINI, 2048),
    _full("medium 1 x 512", MEDIUM, 512),
    _full("medium 1 x 2048", MEDIUM, 2048),
    _full("medium 1 x 2048 offloading", MEDIUM, 2048, offloading=True),
    _full("medium 1 x 4096 offloading", MEDIUM, 4096, offloading=True),
    _full("medium 1 x 2048 every 2nd layer", MEDIUM, 2048, checkpoint_every=2),
    _full("medium 1 x 2048 rank 64", MEDIUM, 2048, lora={"r": 64}),
    _full("medium 4 x 512 packed", MEDIUM, *[512] * 4),
    _full("medium 4 unequal padded", MEDIUM, 1000, 700, 400, 100, packing=False),
    _full("medium 4k 1 x 4096, window reached", MEDIUM_4K, 4096),
    # other models of the family
    _full("3.5 mini 1 x 1536", MINI_3_5, 1536),
    _full("3.5 mini 2 x 3000 packed, adamw_8bit", MINI_3_5, 3000, 3000, optim="adamw_8bit"),
    _full("3.5 mini 1 x 24576 offloading, MLP in tiles", MINI_3_5, 24576, offloading=True, mlp_tile_tokens=2048),
    _full("phi-4 1 x 1024", PHI_4, 1024),
    _full("phi-4 1 x 3001", PHI_4, 3001),
    _full("phi-4 3 unequal packed", PHI_4, 1500, 801, 333),
    _full("phi-4 2 unequal padded", PHI_4, 901, 640, packing=False),
    _full("phi-4 1 x 8192 offloading", PHI_4, 8192, offloading=True),
    _full("phi-4 1 x 4096, MLP in tiles", PHI_4, 4096, mlp_tile_tokens=1024),
    _full("phi-4 1 x 1024 rank 8, tile of 8 MiB", PHI_4, 1024, lora={"r": 8}, tile_mib=8),
    _full("phi-4 1 x 700 DoRA", PHI_4, 700, lora={"use_dora": True}),
    _full("phi-4 1 x 1024 every 8th layer", PHI_4, 1024, checkpoint_every=8),
    _full("reasoning 1 x 20000 offloading", REASONING, 20000, offloading=True),
    _full("Phi-4-mini 1 x 777", PHI_4_MINI, 777),
    _full("Phi-4-mini 6 x 300 padded", PHI_4_MINI, *[300] * 6, packing=False),
    _full("Phi-4-mini 5 unequal packed", PHI_4_MINI, 1801, 900, 450, 225, 112),
    _full("Phi-4-mini 1 x 6000", PHI_4_MINI, 6000),
    _full("Phi-4-mini 1 x 2048 every 2nd layer", PHI_4_MINI, 2048, checkpoint_every=2),
    _full("Phi-4-mini 1 x 1024 head in full", PHI_4_MINI, 1024, lora={"modules_to_save": ["lm_head"]}),
    _full("Phi-4-mini 1 x 2048 tile of 8 MiB, rank 4", PHI_4_MINI, 2048, lora={"r": 4}, tile_mib=8),
    _full("Phi-4-mini 1 x 1024 fp32", PHI_4_MINI, 1024, compute="float32"),
    _full("mini 4k 3 unequal packed, window reached", MINI_4K, 2500, 1200, 300),
    _full("mini 4k 2 unequal padded, window reached", MINI_4K, 2300, 1100, packing=False),
    _full("mini 4k 1 x 2047", MINI_4K, 2047),
    _full("medium 4k 1 x 1900 DoRA", MEDIUM_4K, 1900, lora={"use_dora": True}),
    # ranks and targets
    _full("mini 1 x 1024 rank 4", MINI, 1024, lora={"r": 4}),
    _full("mini 1 x 1024 rank 8 rank-stabilised", MINI, 1024, lora={"r": 8, "use_rslora": True}),
    _full("mini 1 x 1024 rank 32", MINI, 1024, lora={"r": 32}),
    _full("mini 1 x 1024 rank 128 adamw_8bit", MINI, 1024, lora={"r": 128}, optim="adamw_8bit"),
    _full("mini 1 x 1024 rank 256", MINI, 1024, lora={"r": 256}),
    _full("mini 1 x 1500 attention only", MINI, 1500, lora={"target_modules": ["qkv_proj", "o_proj"]}),
    _full("mini 1 x 1500 down only", MINI, 1500, lora={"target_modules": ["down_proj"]}),
    _full("mini 1 x 1500 gate and up only, rank 64", MINI, 1500, lora={"target_modules": ["gate_up_proj"], "r": 64}),
    _full("medium 1 x 1024 qkv only, rank 32", MEDIUM, 1024, lora={"target_modules": ["qkv_proj"], "r": 32}),
    _full("mini 1 x 2048 DoRA, dropout, attention only", MINI, 2048,
          lora={"use_dora": True, "lora_dropout": 0.1, "target_modules": ["qkv_proj", "o_proj"]}),
    _full("mini 1 x 1024 last 8 layers", MINI, 1024, lora={"layers_to_transform": list(range(24, 32))}),
    _full("mini 1 x 1024 embedding and head in full", MINI, 1024, lora={"modules_to_save": ["lm_head", "embed_tokens"]}),
    # tiles and recomputation
    _full("mini 1 x 3333, MLP in tiles, nothing recomputed", MINI, 3333, mlp_tile_tokens=1024, checkpoint_every=0),
    _full("mini 1 x 5000, MLP in tiles, every 4th layer", MINI, 5000, mlp_tile_tokens=2048, checkpoint_every=4),
    _full("mini 1 x 2048 tile of 8 MiB", MINI, 2048, tile_mib=8),
    _full("mini 1 x 4095 tile of 128 MiB", MINI, 4095, tile_mib=128),
    _full("mini 1 x 1024 every 3rd layer", MINI, 1024, checkpoint_every=3),
    _full("mini 1 x 1024 every 16th layer", MINI, 1024, checkpoint_every=16),
    _full("medium 1 x 777 without checkpointing", MEDIUM, 777, checkpoint_every=0),
    # packing and rows of odd lengths
    _full("mini 7 unequal packed", MINI, 1999, 1000, 501, 250, 125, 63, 31),
    _full("mini 7 unequal padded", MINI, 599, 500, 401, 250, 125, 63, 31, packing=False),
    _full("mini 40 x 100 packed", MINI, *[100] * 40),
    _full("mini 3 x 1365 padded, dropout", MINI, *[1365] * 3, packing=False, lora={"lora_dropout": 0.05}),
    _full("mini 1 x 4097", MINI, 4097),
    _full("medium 2 x 5001 packed, offloading", MEDIUM, 5001, 5001, offloading=True),
    # the optimizer, precision, quantization, attention, and what surrounds a step
    _full("mini 1 x 1024 adamw_torch_fused, rank 64", MINI, 1024, lora={"r": 64}, optim="adamw_torch_fused"),
    _full("medium 1 x 1024 paged_adamw_32bit, rank 64", MEDIUM, 1024, lora={"r": 64}, optim="paged_adamw_32bit"),
    _full("mini 1 x 1000 without accumulation, rank 128", MINI, 1000, lora={"r": 128}, accumulates=False),
    _full("mini 1 x 512 longer rows held out", MINI, 512, evaluation_lengths=(4000,)),
    _full("mini 1 x 3000 without evaluation", MINI, 3000, evaluation_lengths=()),
    _full("medium 1 x 1024 FP4 without double quant", MEDIUM, 1024,
          quantization={"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
    _full("mini 2 x 600 eager attention", MINI, 600, 600, attention="eager"),
)  # fmt: skip


def shrink(case: Case) -> Case:
    """The same for a dry run: two layers, four heads, rows of a 64th, nothing that needs a GPU's own memory."""
    config, heads = dict(case.config), 4
    head_size = config["hidden_size"] // config["num_attention_heads"]
    groups = max(1, heads * config["num_key_value_heads"] // config["num_attention_heads"])
    config |= {"num_hidden_layers": 2, "hidden_size": heads * head_size, "intermediate_size": 512, "vocab_size": 2048}
    config |= {"num_attention_heads": heads, "num_key_value_heads": groups}
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    if config["sliding_window"]:
        config["sliding_window"] = config["sliding_window"] // 64
    return replace(
        case,
        config=config,
        lengths=tuple(max(8, length // 64) for length in case.lengths),
        checkpoint_every=min(case.checkpoint_every, 2),
        offloading=False,
        mlp_tile_tokens=case.mlp_tile_tokens // 64,
    )

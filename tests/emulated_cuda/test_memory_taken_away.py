"""Other programs take memory before a run, in the middle of it, and give it back: `python3 scripts/test_cuda.py`."""

import json

import card
from program import MIB

from qlora_phi3.errors import UserError

#: One optimizer batch, which every step has.
LENGTHS = [4000, 3000, 2000, 1000]
#: Step -> what other programs leave for it, in MiB, beside two layers of the model; and what must be done then.
LEFT = {2: 1000, 3: 800, 4: 410, 5: 60}
#: Of a run between two steps, about: weights, adapter, optimizer.
HELD_MIB = 526
REMEDIES = [(2, "again"), (2, "split"), (3, "offload"), (4, "tile"), (5, "again")]


def test_every_remedy_is_reached_and_the_run_goes_on_with_the_same_batches(workplace):
    shop = workplace(2, [*LENGTHS, *[100] * 4])
    shop.write(memory={"rehearsal": False}, training={"eval_strategy": "no", "max_steps": 7})
    before_step = {step: lambda mib=mib: card.leave(mib * MIB) for step, mib in LEFT.items()}
    stopped = shop.on_card("run", "mine.toml", before_step=before_step)
    records = shop.metrics("oom")
    assert [(record["step"], record["remedy"]) for record in records] == REMEDIES
    # What was allocated when memory ran out, not what is left after the stack has unwound: nearly all that there was.
    unused = [HELD_MIB + LEFT[record["step"]] - record["allocated_bytes"] / MIB for record in records]
    assert all(0 < mib < 130 for mib in unused), unused  # the request that failed was that large
    assert stopped.exit_code == UserError.exit_code
    assert "chats.jsonl:1 with its 3,990 tokens does not fit in the memory of NVIDIA GeForce RTX 3060: step 5" in stopped.error
    assert "Close other programs that use this memory and go on with --resume" in stopped.error
    assert shop.report()["status"] == "failed"
    assert [path.name for path in (shop.runs()[-1] / "checkpoints").iterdir()] == ["checkpoint-4"]
    # The memory is given back, taken and given back once more; the lowered plan stays, and nothing else fails.
    resumed = shop.on_card("run", "mine.toml", "--resume", before_step={6: before_step[4], 7: lambda: card.hold(0)})
    assert resumed.exit_code == 0, resumed.stderr
    assert len(shop.metrics("oom")) == len(REMEDIES)
    steps = shop.metrics("train")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert len({(step["rows"], step["tokens"], step["supervised_tokens"]) for step in steps}) == 1
    assert len(shop.runs()) == 1


def test_what_other_programs_hold_is_seen_and_planned_with(workplace):
    shop = workplace(2, [200] * 8)
    shop.write()
    shown = shop.on_card("vram-check", others_mib=9000)
    assert "desktop" in shown.stdout, shown.stderr
    planned = shop.on_card("vram-check", "mine.toml", "--json", others_mib=9000)
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["budget_bytes"] == (11910 - 9000) * MIB

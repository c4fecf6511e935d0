"""Complete runs that must end in the same adapter, byte for byte (fp32, CPU)."""

import pytest

FILES = ("adapter_model.safetensors", "adapter_config.json")


def adapter_of(shop, *overrides):
    """Run the recipe with these overrides; the bytes of the adapter it ends in."""
    result = shop.run(*(word for override in overrides for word in ("--set", override)))
    assert result.exit_code == 0, result.stderr
    folder = shop.runs()[-1] / "adapter"
    return [(folder / name).read_bytes() for name in FILES]


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(shop):
    shop.write(lora={"r": 4, "lora_dropout": 0.1}, training={"save_strategy": "no", "num_train_epochs": 0.5})
    first = adapter_of(shop)
    assert adapter_of(shop) == first
    assert adapter_of(shop, "training.seed=7")[0] != first[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_measuring_between_steps_changes_nothing(shop, dropout):
    shop.write(lora={"r": 4, "lora_dropout": dropout}, training={"save_strategy": "no", "num_train_epochs": 0.5})
    often = adapter_of(shop, "training.eval_steps=1")
    assert adapter_of(shop, "training.eval_strategy=no") == often


@pytest.mark.parametrize(
    "override",
    ["training.per_device_train_batch_size=4", "training.gradient_checkpointing=false", "training.save_steps=1"],
)
def test_what_only_costs_memory_or_disk_changes_nothing(shop, override):
    shop.write(training={"num_train_epochs": 0.3})
    plain = adapter_of(shop)
    changed = adapter_of(shop, override)
    assert changed == plain

"""The simulation runs any objective, and predicts the memory of its step."""

import pytest
import torch
from memory_bench.cases import Case, mid_size
from memory_bench.truth import Marks, build_random, peaks_of, profile_memory, step_shape
from weighted_objective import weighted_logprobs

from qlora_phi3.memory.simulate import run_one_step, simulate
from qlora_phi3.step import collate

INSIDE_BYTES = 150_000  # as in test_memory_simulate.py


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}])
def test_the_peak_of_another_objective_is_predicted(lora):
    config = mid_size(2, 256, 512, heads=4, vocab_size=4096, bos_token_id=0, eos_token_id=0)
    case = Case(name="log-probabilities", config=config, lengths=(192,), lora=lora)
    dtype = getattr(torch, case.compute)
    predicted = (
        simulate(
            case.recipe,
            dict(case.config),
            case.architecture,
            case.execution,
            step_shape(case),
            compute_dtype=dtype,
            capability=None,
            objective=weighted_logprobs,
        )
        .report()
        .by_phase
    )
    rows = [{"input_ids": [0] * length, "labels": [0] * length} for length in case.lengths]
    batch, marks = collate(rows, case.execution.micro_batch), Marks()
    with profile_memory() as watched:
        marks.enter("load")
        model = build_random(case, torch.device("cpu"))
        marks.enter("loaded")
        run_one_step(
            model,
            [batch],
            batch,
            case.recipe.training,
            case.execution.optim,
            compute_dtype=dtype,
            on_cuda=False,
            accumulates=case.accumulates,
            tracker=marks,
            objective=weighted_logprobs,
        )
    measured = peaks_of(watched)
    for phase in ("forward", "backward", "evaluation"):
        assert predicted[phase] == pytest.approx(measured[phase], abs=INSIDE_BYTES), phase

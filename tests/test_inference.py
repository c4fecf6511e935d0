"""A run, an adapter and an export are loaded as what they are, and generate the same text in one piece and in many."""

import shutil
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from tiny import build_tokenizer, hub_template
from trained_run import leave_trained

from qlora_phi3.adapters.base_files import MARK
from qlora_phi3.data.formats import Chat
from qlora_phi3.data.messages import Turn
from qlora_phi3.data.template import choose_template, render_chat
from qlora_phi3.errors import DataError, ModelError
from qlora_phi3.inference import (
    encode,
    fit_messages,
    generate,
    generate_batch,
    load_for_inference,
    sampling,
    stop_ids,
)
from qlora_phi3.model.phi3 import find_base

CPU = torch.device("cpu")
QUESTION = [{"role": "user", "content": "What is red?"}]
IDS = torch.randint(3, 500, (1, 20), generator=torch.Generator().manual_seed(0))


def answer(inference, messages=QUESTION, max_new_tokens=64, **options):
    """What the model answers."""
    return generate(inference, messages, max_new_tokens=max_new_tokens, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    return leave_trained(tmp_path_factory.mktemp("trained"), base)


@pytest.fixture(scope="module")
def loaded(run):
    return load_for_inference(run.adapter.parent, device=CPU)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def linear_4bit(model):
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def test_a_run_is_loaded_in_4bit_and_computes_what_was_trained(run, loaded):
    assert len(linear_4bit(loaded.model)) == 8
    assert not any(layer.support_avx512bf16_for_cpu for layer in linear_4bit(loaded.model))
    assert torch.equal(logits(loaded.model), logits(run.live))


def test_the_adapter_inside_a_run_is_loaded_as_the_run(run, loaded):
    assert torch.equal(logits(load_for_inference(run.adapter, device=CPU).model), logits(loaded.model))


def test_an_adapter_by_itself_is_loaded_onto_its_base_in_4bit(run, loaded, tmp_path):
    adapter = shutil.copytree(run.adapter, tmp_path / "copied")
    alone = load_for_inference(adapter, device=CPU, dtype=torch.float32)
    assert len(linear_4bit(alone.model)) == 8
    assert torch.equal(logits(alone.model), logits(loaded.model))
    assert alone.stop_ids == loaded.stop_ids


def test_a_base_that_has_moved_is_named_and_one_that_is_gone_is_one_line(tmp_path, base):
    here = shutil.copytree(base, tmp_path / "here")
    run = leave_trained(tmp_path / "run", here)
    there = here.rename(tmp_path / "there")
    with pytest.raises(ModelError, match=rf"The base of {tmp_path}/run is gone: there is no folder {here}"):
        load_for_inference(tmp_path / "run", device=CPU)
    assert torch.equal(logits(load_for_inference(tmp_path / "run", base=there, device=CPU).model), logits(run.live))
    with pytest.raises(ModelError, match="it is a complete model"):
        load_for_inference(there, base=there, device=CPU)


def test_a_run_that_was_not_quantized_is_not_quantized(tmp_path, base):
    run = leave_trained(tmp_path, base, load_in_4bit=False)
    model = load_for_inference(tmp_path, device=CPU).model
    assert linear_4bit(model) == []
    assert torch.equal(logits(model), logits(run.live))


def test_a_run_in_bf16_keeps_its_adapter_in_fp32_and_generates(tmp_path, base):
    leave_trained(tmp_path, base, bnb_4bit_compute_dtype="bfloat16")
    inference = load_for_inference(tmp_path, device=CPU)
    assert inference.model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for name, p in inference.model.named_parameters() if "lora_" in name} == {torch.float32}
    assert answer(inference, max_new_tokens=4).text


def test_an_export_is_loaded_in_its_own_dtype_or_the_one_given(tmp_path, base):
    inference = load_for_inference(base, device=CPU)
    assert linear_4bit(inference.model) == []
    assert inference.model.lm_head.weight.dtype == torch.float32
    assert load_for_inference(base, device=CPU, dtype=torch.bfloat16).model.lm_head.weight.dtype == torch.bfloat16


def test_the_stop_ids_of_a_run_are_end_of_text_and_end_of_turn(loaded):
    tokenizer = loaded.tokenizer
    assert loaded.stop_ids == (find_base(loaded.model).config.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>"))


@pytest.mark.parametrize(
    ("eos", "end", "expected"),
    [(None, None, ()), (2, None, (2,)), (2, 7, (2, 7)), ([5, 2], 2, (5, 2)), ([5, 2], 9, (5, 2, 9)), (None, 3, (3,))],
)
def test_stop_ids_are_each_listed_once(eos, end, expected):
    assert stop_ids(eos, end) == expected


def test_a_run_with_another_template_generates_with_it(tmp_path, base):
    leave_trained(tmp_path, base, chat_template="phi4-mini")
    tokenizer = load_for_inference(tmp_path, device=CPU).tokenizer
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>What is red?<|end|><|assistant|>"
    assert not MARK.search(tokenizer.chat_template)


def test_a_greedy_answer_is_that_of_transformers(loaded):
    prompt = "<|user|>\nWhat is red?<|end|>\n<|assistant|>\n"
    ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids
    output = loaded.model.generate(
        input_ids=ids, max_new_tokens=12, do_sample=False, use_cache=True, eos_token_id=list(loaded.stop_ids)
    )
    expected = loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert expected
    assert answer(loaded, max_new_tokens=12).text == expected


def test_the_pieces_of_a_stream_make_the_text(loaded, monkeypatch):
    vocabulary = loaded.tokenizer.get_vocab()
    bytes_alone = [token_id for token, token_id in vocabulary.items() if token.startswith("<0x")]
    monkeypatch.setattr(loaded.model.generation_config, "suppress_tokens", bytes_alone)  # random ones are no UTF-8
    pieces = []
    whole = answer(loaded, max_new_tokens=12, show=pieces.append)
    assert len(pieces) > 2
    assert "".join(pieces) == whole.text


def test_a_sampled_answer_depends_on_the_seed_alone(loaded):
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(answer(loaded, max_new_tokens=12, sampling=sampling(2.0)).text)
    assert texts[0] == texts[1] != texts[2]


def test_ctrl_c_while_a_piece_is_shown_stops_generating(loaded):
    def interrupt(piece):
        raise KeyboardInterrupt

    calls = []
    handle = find_base(loaded.model).register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(KeyboardInterrupt):
        answer(loaded, max_new_tokens=200, show=interrupt)
    handle.remove()
    assert len(calls) < 200


def test_an_error_while_generating_reaches_the_reader(loaded):
    def fail(*_):
        raise RuntimeError("from the model")

    handle = find_base(loaded.model).register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="from the model"):
            answer(loaded)
    finally:
        handle.remove()


def test_a_streamed_text_keeps_indentation_and_whole_characters(loaded, monkeypatch):
    text = "if x:\n    return 1\n        # ä"

    def generate_text(input_ids, stopping_criteria, **_):
        for number in loaded.tokenizer(text, add_special_tokens=False).input_ids:
            input_ids = torch.cat([input_ids, torch.tensor([[number]])], 1)
            stopping_criteria[0](input_ids, None)
        return input_ids

    monkeypatch.setattr(loaded.model, "generate", generate_text)
    pieces = []
    answer(loaded, show=pieces.append)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stop_id_ends_the_answer(loaded):
    first = answer(loaded, max_new_tokens=1)
    assert (first.num_tokens, first.ended_by_itself) == (1, False)
    every = replace(loaded, stop_ids=tuple(range(len(loaded.tokenizer))))
    ended = answer(every, max_new_tokens=50)
    assert (ended.text, ended.num_tokens, ended.ended_by_itself) == (first.text, 0, True)


def test_a_prompt_that_fills_every_position_is_refused(loaded):
    with pytest.raises(DataError, match="512"):
        answer(loaded, [{"role": "user", "content": "word " * 600}])


def test_a_message_without_content_is_refused(loaded):
    with pytest.raises(DataError):
        answer(loaded, [{"role": "user"}])


def test_several_prompts_at_once_get_the_answers_that_each_gets_alone(loaded):
    prompts = [
        encode(loaded, [{"role": "user", "content": text}]) for text in ("What is red?", "What is a much longer question?")
    ]
    limits = [5, 9]
    alone = [generate_batch(loaded, [prompt], [limit])[0] for prompt, limit in zip(prompts, limits, strict=True)]
    assert generate_batch(loaded, prompts, limits) == alone
    assert [len(ids) for ids in alone] == limits


def test_the_first_stop_id_is_the_last_id_of_an_answer(loaded):
    prompt = encode(loaded, QUESTION)
    [ids] = generate_batch(loaded, [prompt], [8])
    third = replace(loaded, stop_ids=(ids[2],))
    assert generate_batch(third, [prompt, prompt], [8, 2]) == [ids[: ids.index(ids[2]) + 1], ids[:2]]


def test_an_answer_without_the_adapter_is_that_of_the_base(tmp_path, base):
    leave_trained(tmp_path, base, load_in_4bit=False)
    tuned, alone = load_for_inference(tmp_path, device=CPU), load_for_inference(base, device=CPU)
    with tuned.model.disable_adapter():
        disabled = answer(tuned, max_new_tokens=12)
    assert disabled == answer(replace(alone, stop_ids=tuned.stop_ids), max_new_tokens=12)
    assert disabled != answer(tuned, max_new_tokens=12)


@pytest.mark.parametrize("template", ["Phi-3-mini-4k-instruct", "Phi-3-medium-4k-instruct", "Phi-3.5-mini-instruct"])
def test_a_system_turn_is_encoded_as_it_is_trained(loaded, template):
    tokenizer = build_tokenizer(hub_template(template))
    turns = [Turn("system", "Be brief."), Turn("user", "What is red?"), Turn("assistant", "A cherry.")]
    trained, _, _ = render_chat(Chat(tuple(turns)), choose_template(tokenizer))
    messages = [{"role": turn.role, "content": turn.text} for turn in turns[:2]]
    encoded = tokenizer.decode(encode(replace(loaded, tokenizer=tokenizer), messages))
    assert "".join(encoded.split()) == "".join(trained.partition("A cherry.")[0].split())


def test_a_conversation_that_is_too_long_loses_its_oldest_pairs(loaded):
    words = "word " * 60
    pairs = [{"role": role, "content": f"{number} {words}"} for number in range(8) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "Be brief."}, *pairs, *QUESTION]
    kept = fit_messages(loaded, messages, 512)
    assert len(encode(loaded, kept)) <= 512 - 128 < len(encode(loaded, messages))
    assert kept[0] == messages[0]
    assert kept[1:] == messages[-(len(kept) - 1) :]
    assert kept[1]["role"] == "user"
    assert len(encode(loaded, [kept[0], *messages[-(len(kept) + 1) :]])) > 512 - 128


def test_a_conversation_that_fits_is_kept(loaded):
    assert fit_messages(loaded, QUESTION, 512) == QUESTION

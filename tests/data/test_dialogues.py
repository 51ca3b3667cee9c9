"""Dialogues as samples: which tokens are the assistant's, to the position, and every form that data comes in."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import datasets
import pytest
import torch
from transformers import LlamaConfig

from petals_lightning.data import DialogueDataModule, load_tokenizer
from petals_lightning.data.collate import IGNORED
from petals_lightning.data.dialogue_format import DialogueFormat, Message
from petals_lightning.data.dialogues import read_dialogue, split_dialogue
from petals_lightning.errors import ConfigurationError, DataError
from tests.helpers.chat_templates import GEMMA, QWEN3, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def talk(*contents: str) -> list[Message]:
    return [Message(role=("user", "assistant")[i % 2], content=content) for i, content in enumerate(contents)]


def words(tokenizer, ids: list[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


def test_labels_stand_on_the_assistants_tokens_and_the_end_of_its_turns(text_model):
    tokenizer = load_tokenizer(str(text_model))
    ids, labels = DialogueFormat(tokenizer).encode(talk("w1 w2", "w3 w4", "w5", "w6"))
    assert words(tokenizer, ids) == [
        "<unk>", "w1", "w2", "<unk>", "w3", "w4", "</s>", "<unk>", "w5", "<unk>", "w6", "</s>",
    ]  # fmt: skip
    assert [position for position, label in enumerate(labels) if label != IGNORED] == [4, 5, 6, 10, 11]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_a_chat_template_is_used_and_gives_the_same_tokens(text_model):
    tokenizer: Any = load_tokenizer(str(text_model))
    tokenizer.chat_template = TEMPLATE
    form, messages = DialogueFormat(tokenizer), talk("w1 w2", "w3", "w4", "w5 w6")
    ids, labels = form.encode(messages)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert words(tokenizer, [label for label in labels if label != IGNORED]) == ["w3", "</s>", "w5", "w6", "</s>"]
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert form.prompt(messages[:3]) == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_prompt_is_where_training_begins_to_read(text_model):
    """What chat feeds is, token for token, what the labels were trained behind."""
    form = DialogueFormat(load_tokenizer(str(text_model)))
    ids, labels = form.encode(talk("w1 w2", "w3 w4", "w5", "w6"))
    prompt = form.prompt(talk("w1 w2", "w3 w4", "w5"))
    assert prompt == ids[: len(prompt)]
    assert labels[len(prompt)] != IGNORED


def test_every_form_of_dialogues_is_read():
    expected = talk("a", "b", "c", "d")
    assert read_dialogue({"turns": ["a", "b", "c", "d"], "id": 3}, "row 0") == expected
    assert read_dialogue({"messages": [dict(message) for message in expected]}, "row 0") == expected
    speakers = ("human", "gpt", "User", "ASSISTANT")
    shared = [{"from": who, "value": text} for who, text in zip(speakers, "abcd", strict=True)]
    assert read_dialogue({"conversations": shared}, "row 0") == expected
    assert read_dialogue({"conversation": shared, "prompt": "x", "completion": "y"}, "row 0") == expected
    assert read_dialogue({"prompt": "a", "completion": "b"}, "row 0") == expected[:2]
    assert read_dialogue({"prompt": expected[:3], "completion": expected[3:]}, "row 0") == expected
    assert read_dialogue({"prompt": expected[:3], "response": "d"}, "row 0") == expected
    assert read_dialogue({"instruction": "a", "input": "", "output": "b"}, "row 0") == expected[:2]
    assert read_dialogue({"instruction": "a", "input": "x", "output": "b"}, "row 0") == talk("a\n\nx", "b")
    assert read_dialogue({"messages": [], "turns": ["a", "b"]}, "row 0") == expected[:2]
    assert read_dialogue({"messages": []}, "row 0") == []
    assert read_dialogue({"system": "s", "turns": ["a"]}, "row 0") == [{"role": "system", "content": "s"}, expected[0]]
    last = {"history": ["a", "b", "c"], "candidates": ["wrong", "d"]}
    persona = {"personality": ["i sing .", "i fly ."], "utterances": [{"history": ["a"], "candidates": ["b"]}, last]}
    assert read_dialogue(persona, "row 0") == [Message(role="system", content="i sing . i fly ."), *expected]


def test_content_may_be_in_parts_and_other_roles_have_one_meaning():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}]
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    given = [
        {"role": "developer", "content": "s", "name": None},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {"from": "observation", "value": "2"},
        {"role": "assistant", "content": ["c"], "weight": 0},
    ]
    assert read_dialogue({"messages": given}, "row 0") == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "c", "weight": 0},
    ]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "a"}, "row 3 of train has text: a dialogue needs `turns`"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "needs role and content; roles are system, user, .*, gpt"),
        ({"messages": [{"role": "user"}]}, "turn without a text: None"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "turn without a text: {'type': 'image"),
        ({"turns": ["a", None]}, "turn without a text"),
        ({"prompt": "a", "completion": 1}, "turn without a text: 1"),
    ],
)
def test_what_is_no_dialogue_is_named(row, complaint):
    with pytest.raises(DataError, match=complaint):
        read_dialogue(row, "row 3 of train")


CALLING = (
    "{% for tool in tools or [] %}{{ tool.name + ' ' + (tool | tojson) + '\n' }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def calling(arguments: dict) -> list[dict]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "no"},
    ]


def folder_of(tokenizer, path) -> str:
    tokenizer.save_pretrained(path)
    LlamaConfig(vocab_size=len(tokenizer), eos_token_id=3).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("as_json", [False, True])
def test_calls_of_tools_are_as_they_were_written_and_the_template_sees_the_tools(tmp_path, suffix, as_json):
    """Columns of Arrow give an object the keys of all rows; each row's own arguments are what counts."""
    tokenizer: Any = make_tokenizer("byte_level", CALLING, "<|im_end|>")
    dialogues = [calling({"x": 1}), calling({"y": {"z": "w"}}), calling({})] * 2
    tools = [{"name": "f", "description": "does it"}]
    rows: list[dict[str, Any]] = [
        {"messages": deepcopy(talk), "tools": json.dumps(tools) if as_json else tools} for talk in dialogues
    ]
    path = tmp_path / f"talks.{suffix}"
    if suffix == "jsonl":
        write_rows(path, rows)
    else:
        for row in rows:  # Arrow has no objects without keys
            row["messages"] = [{**turn, "tool_calls": turn.get("tool_calls", [])} for turn in row["messages"]]
            for call in row["messages"][1]["tool_calls"]:
                call["function"]["arguments"] = call["function"]["arguments"] or {"x": None}
        datasets.Dataset.from_list(rows).to_parquet(path)
    data = DialogueDataModule(folder_of(tokenizer, tmp_path), str(path), max_length=1000)
    data.setup()
    expected = [tokenizer.apply_chat_template(talk, tools=tools, return_dict=False) for talk in dialogues]
    found = [data._splits[split][number][0] for split, size in data.sizes.items() for number in range(size)]
    assert sorted(found) == sorted(expected)


def test_tools_that_cannot_be_told_are_named(text_model, tmp_path):
    for tools, message in [("[", "row 0 of train .* has tools that are not JSON"), ({"a": 1}, "for tools: give a list"),
                           ([{"name": "f"}], r"the simple form has no tools")]:  # fmt: skip
        path = write_rows(tmp_path / "a.jsonl", [{"turns": ["w1", "w2"], "tools": tools}] * 2)
        with pytest.raises(DataError, match=message.replace("row 0", r"row \d")):
            DialogueDataModule(str(text_model), path).setup()


def test_a_part_in_which_nothing_is_learnt_says_why(text_model, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"turns": ["w1 " * 30, "w2"]}] * 4)
    with pytest.raises(DataError, match=r"train of .*a\.jsonl: .*none to train on within max_length=20"):
        DialogueDataModule(str(text_model), path, max_length=20).setup()


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def learnt(data: DialogueDataModule, tokenizer) -> set[tuple[str, ...]]:
    """What each sample of all splits teaches."""
    data.setup()
    batches = [batch for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]
    return {tuple(words(tokenizer, row[row != IGNORED].tolist())) for batch in batches for row in batch["labels"]}


def test_columns_are_found_in_files_or_named(text_model, tmp_path):
    tokenizer = load_tokenizer(str(text_model))
    alpaca = [{"instruction": f"w{row}", "input": "w90" if row % 2 else "", "output": f"w2{row}"} for row in range(6)]
    path = write_rows(tmp_path / "alpaca.jsonl", alpaca)
    assert learnt(DialogueDataModule(str(text_model), path), tokenizer) == {(f"w2{row}", "</s>") for row in range(6)}
    questions = [{"question": f"w{row}", "reply": f"w3{row}", "messages": "w1"} for row in range(6)]
    path = write_rows(tmp_path / "questions.jsonl", questions)
    columns = {"prompt": "question", "completion": "reply"}
    data = DialogueDataModule(str(text_model), path, columns=columns)
    assert learnt(data, tokenizer) == {(f"w3{row}", "</s>") for row in range(6)}
    with pytest.raises(
        DataError, match=r"^columns=\{.*\}: train of .*questions.jsonl has no column 'answer'; it has quest"
    ):
        DialogueDataModule(str(text_model), path, columns={**columns, "completion": "answer"}).setup()
    with pytest.raises(ConfigurationError, match=r"names answer; give messages, "):
        DialogueDataModule(str(text_model), path, columns={"answer": "reply"})


def test_a_row_that_the_template_refuses_is_named_by_its_number_in_the_file(tmp_path):
    tokenizer = make_tokenizer("byte_level", GEMMA)
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=3)
    config.save_pretrained(tmp_path)
    rows = [{"messages": talk("So?", "no")} for _ in range(20)]
    rows[13]["messages"].insert(0, Message(role="system", content="Be kind."))
    source = write_rows(tmp_path / "talks.jsonl", rows)
    with pytest.raises(DataError) as refused:
        DialogueDataModule(str(tmp_path), source).setup()
    assert str(refused.value) == (
        f"row 13 of train of {source}: the chat template refuses the dialogue (System role not supported); "
        "merge_system=True (chat: --merge-system) puts the system's text before the first user turn"
    )
    data = DialogueDataModule(str(tmp_path), source, merge_system=True)
    data.setup()
    assert sum(data.sizes.values()) == 20


def test_long_dialogues_become_samples_of_whole_exchanges(text_model):
    form = DialogueFormat(load_tokenizer(str(text_model)))
    messages = [Message(role="system", content="w0"), *talk("w1", "w2", "w3", "w4", "w5 w5 w5 w5 w5 w5 w5 w5", "w6")]
    samples = split_dialogue(messages, form, max_length=12)
    parts = [messages[:5], [messages[0], *messages[5:]]]
    encoded = [form.encode(part) for part in parts]
    assert [ids for ids, _ in samples] == [ids[:12] for ids, _ in encoded]
    assert split_dialogue(talk("w1"), form, 12) == [], "nobody answers"


def test_windows_of_a_template_that_rewrites_the_past():
    """Each answer is learnt once, behind as many whole exchanges as there is room for."""
    tokenizer = make_tokenizer("byte_level", QWEN3, "<|im_end|>")
    form, messages = DialogueFormat(tokenizer), talk(*["So?", "no"] * 7)
    lengths = [len(form.encode(messages[:size])[0]) for size in (2, 4, 6)]
    found = split_dialogue(messages, form, max_length=lengths[-1])
    assert [len(ids) for ids, _ in found] == [*lengths, *lengths, lengths[0]]
    for ids, labels in found:
        assert (
            tokenizer.decode([label for label in labels if label != IGNORED]) == "<think>\n\n</think>\n\nno<|im_end|>"
        )
        assert labels[-2] == ids[-2] == tokenizer.eos_token_id


def test_batches_are_padded_and_cut_from_files(text_model, tmp_path):
    lines = [json.dumps({"turns": ["w1 w2", "w3"] * (1 + row % 3)}) for row in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    data = DialogueDataModule(str(text_model), str(tmp_path / "train.jsonl"), batch_size=4, limit=10)
    data.setup()
    assert data.sizes == {"train": 10, "validation": 2}
    for batch in data.train_dataloader():
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert len({tensor.shape for tensor in batch.values()}) == 1
        padding = batch["attention_mask"] == 0
        assert torch.all(batch["labels"][padding] == IGNORED)
        labelled = batch["labels"] != IGNORED
        assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])

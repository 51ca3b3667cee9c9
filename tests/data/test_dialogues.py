"""Dialogues as samples: which tokens are the assistant's, to the position, and every form that data comes in."""

from __future__ import annotations

import json

import pytest
import torch

from petals_lightning.data import DialogueDataModule, load_tokenizer
from petals_lightning.data.dialogue_format import IGNORED, DialogueFormat, Message
from petals_lightning.data.dialogues import read_dialogue, windows
from petals_lightning.errors import DataError

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
    tokenizer = load_tokenizer(str(text_model))
    tokenizer.chat_template = TEMPLATE
    form, messages = DialogueFormat(tokenizer), talk("w1 w2", "w3", "w4", "w5 w6")
    ids, labels = form.encode(messages)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert words(tokenizer, [label for label in labels if label != IGNORED]) == ["w3", "</s>", "w5", "w6", "</s>"]
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert form.prompt(messages[:3]) == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_template_that_rewrites_the_past_is_refused(text_model):
    tokenizer = load_tokenizer(str(text_model))
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(DataError, match="use_chat_template=false"):
        DialogueFormat(tokenizer).encode(talk("w1", "w2"))
    assert DialogueFormat(tokenizer, use_chat_template=False).encode(talk("w1", "w2"))


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
    last = {"history": ["a", "b", "c"], "candidates": ["wrong", "d"]}
    persona = {"personality": ["i sing .", "i fly ."], "utterances": [{"history": ["a"], "candidates": ["b"]}, last]}
    assert read_dialogue(persona, "row 0") == [Message(role="system", content="i sing . i fly ."), *expected]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "a"}, "row 3 of train has text: a dialogue needs `turns`"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "needs role"),
        ({"messages": [{"role": "user"}]}, "turn without a text"),
        ({"turns": ["a", None]}, "turn without a text"),
    ],
)
def test_what_is_no_dialogue_is_named(row, complaint):
    with pytest.raises(DataError, match=complaint):
        read_dialogue(row, "row 3 of train")


def test_long_dialogues_become_samples_of_whole_exchanges(text_model):
    form = DialogueFormat(load_tokenizer(str(text_model)))
    messages = [Message(role="system", content="w0"), *talk("w1", "w2", "w3", "w4", "w5 w5 w5 w5 w5 w5 w5 w5", "w6")]
    samples = windows(messages, form, max_length=12)
    parts = [messages[:5], [messages[0], *messages[5:]]]
    encoded = [form.encode(part) for part in parts]
    assert [ids for ids, _ in samples] == [ids[:12] for ids, _ in encoded]
    assert windows(talk("w1"), form, 12) == [], "nobody answers"


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

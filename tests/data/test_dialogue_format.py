"""Tokens are `apply_chat_template`'s for every kind of template and tokenizer; labels are what the assistant says."""

from __future__ import annotations

from typing import Any

import pytest

from petals_lightning.data.collate import IGNORED
from petals_lightning.data.dialogue_format import DialogueFormat, Message, samples
from petals_lightning.errors import DataError
from tests.helpers.chat_templates import ALTERNATE, CHATML, GEMMA, MISTRAL, QWEN3, TEMPLATES, TOKENIZERS, make_tokenizer


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


def system(content: str) -> Message:
    return Message(role="system", content=content)


DIALOGUE = [user("What is it?"), assistant("Hello there"), user("  Ünd?\n\nno "), assistant("yes!\n\nNo fox."),
            user("So?"), assistant("no")]  # fmt: skip
ANSWERS = ("Hello there", "yes!\n\nNo fox.", "no")

# What the assistant says in each turn, by the text of the template, {} being the content.
SAID = {
    "chatml": "{}<|im_end|>",
    "llama3": "{}<|eot_id|>",
    "gemma": "{}<end_of_turn>",
    "mistral": " {}</s>",
    "mistral_v3": " {}</s>",
    "qwen3": "<think>\n\n</think>\n\n{}<|im_end|>",
    "deepseek_v3": "{}<｜end▁of▁sentence｜>",
    "deepseek_r1": "{}<｜end▁of▁sentence｜>",
    "phi3": "{}<|end|>\n",  # the token takes the line break along
    "numbered": " {}</s>",
    "counted": " {}</s>",
}
ENDS = {"gemma": ["<eos>", "<end_of_turn>"], "phi3": ["<|endoftext|>", "<|end|>"]}


def labels_of(tokenizer, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The text's tokens, and those as labels that end within one of the spans of characters."""
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in read["offset_mapping"]]
    is_said = [any(first < end <= last for first, last in spans) for end in ends]
    ids = read["input_ids"]
    return ids, [token if said else IGNORED for token, said in zip(ids, is_said, strict=True)]


@pytest.mark.parametrize("tokenizer_kind", TOKENIZERS)
@pytest.mark.parametrize("kind", TEMPLATES)
def test_tokens_are_those_of_apply_chat_template(kind, tokenizer_kind):
    tokenizer: Any = make_tokenizer(tokenizer_kind, *TEMPLATES[kind])
    form = DialogueFormat(tokenizer)
    for turns in (1, 3, 5):
        prompt = tokenizer.apply_chat_template(DIALOGUE[:turns], add_generation_prompt=True, return_dict=False)
        assert form.prompt(DIALOGUE[:turns]) == prompt
    for turns in (2, 4, 6):
        whole = tokenizer.apply_chat_template(DIALOGUE[:turns], return_dict=False)
        assert form.encode(DIALOGUE[:turns])[0] == whole
    ends = ENDS.get(kind, [TEMPLATES[kind][1]])
    assert tokenizer.convert_ids_to_tokens(form.end_ids) == ends


@pytest.mark.parametrize("tokenizer_kind", TOKENIZERS)
@pytest.mark.parametrize("kind", sorted(set(TEMPLATES) - {"qwen3", "counted", "mistral_v3"}))
def test_templates_that_leave_the_past_alone_give_one_sample(kind, tokenizer_kind):
    tokenizer: Any = make_tokenizer(tokenizer_kind, *TEMPLATES[kind])
    text = tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    spans: list[tuple[int, int]] = []
    for answer in ANSWERS:
        said = SAID[kind].format(answer)
        begin = text.index(said, spans[-1][1] if spans else 0)
        spans.append((begin, begin + len(said)))
    expected = labels_of(tokenizer, text, spans)
    assert sum(label != IGNORED for label in expected[1]) > 10, "the test is blind"
    form = DialogueFormat(tokenizer)
    assert samples(list(form.answers(DIALOGUE))) == [expected]
    assert form.encode(DIALOGUE) == expected


@pytest.mark.parametrize("tokenizer_kind", TOKENIZERS)
@pytest.mark.parametrize("kind", ["qwen3", "counted", "mistral_v3"])
def test_templates_that_rewrite_the_past_give_a_sample_for_each_answer(kind, tokenizer_kind):
    """Each answer stands behind the prompt that the model gets in a chat, token for token."""
    tokenizer: Any = make_tokenizer(tokenizer_kind, *TEMPLATES[kind])
    dialogue = [system("Be kind."), *DIALOGUE] if kind == "mistral_v3" else DIALOGUE
    found = samples(list(DialogueFormat(tokenizer).answers(dialogue)))
    assert len(found) == 3
    for (ids, labels), index in zip(found, range(len(dialogue) - 5, len(dialogue), 2), strict=True):
        said = SAID[kind].format(dialogue[index]["content"])
        prompt = tokenizer.apply_chat_template(dialogue[:index], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(dialogue[: index + 1], tokenize=False)
        assert whole.startswith(prompt) == (kind == "qwen3"), "the test is about others"
        text = prompt + said + whole[whole.rindex(said) + len(said) :]
        assert (ids, labels) == labels_of(tokenizer, text, [(len(prompt), len(prompt + said))])


def test_thoughts_are_learnt_where_they_were_thought():
    tokenizer: Any = make_tokenizer("byte_level", QWEN3, "<|im_end|>")
    thinking = [user("So?"), assistant("<think>\nhm\n</think>\n\nno"), user("So?"),
                Message(role="assistant", content="yes!", reasoning_content="well")]  # fmt: skip
    found = samples(list(DialogueFormat(tokenizer).answers(thinking)))
    learnt = [tokenizer.decode([label for label in labels if label != IGNORED]) for _, labels in found]
    assert learnt == [f"<think>\n{thought}</think>\n\n{said}<|im_end|>" for thought, said in
                      (("hm\n", "no"), ("well\n", "yes!"))]  # fmt: skip
    assert "hm" not in tokenizer.decode(found[1][0])


def test_calls_of_tools_are_parts_of_one_turn():
    tokenizer: Any = make_tokenizer("byte_level", QWEN3, "<|im_end|>")
    called = [user("What is it?"), assistant("call"), Message(role="tool", content="fox"), assistant("Fox.")]
    (_, first), (ids, second) = samples(list(DialogueFormat(tokenizer).answers(called)))
    assert tokenizer.decode([label for label in first if label >= 0]) == "<think>\n\n</think>\n\ncall<|im_end|>"
    assert tokenizer.decode([label for label in second if label >= 0]) == "<think>\n\n</think>\n\nFox.<|im_end|>"
    assert ids == tokenizer.apply_chat_template(called, return_dict=False)


@pytest.mark.parametrize("tokenizer_kind", TOKENIZERS)
def test_a_token_that_reaches_from_the_prompt_into_the_answer_is_learnt(tokenizer_kind):
    """As `apply_chat_template` has it: the prompt alone ends with a blank, the whole has it in the first word."""
    template = (
        "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
    )
    tokenizer: Any = make_tokenizer(tokenizer_kind, template)
    dialogue = [user("So?"), assistant("Hello there")]
    ids, labels = DialogueFormat(tokenizer).encode(dialogue)
    text = tokenizer.apply_chat_template(dialogue, tokenize=False)
    prompt = tokenizer.apply_chat_template(dialogue[:1], return_dict=False, add_generation_prompt=True)
    assert ids[: len(prompt)] != prompt, "the test is blind"
    assert (ids, labels) == labels_of(tokenizer, text, [(text.index("Hello"), len(text))])


@pytest.mark.parametrize("tokenizer_kind", TOKENIZERS)
def test_without_a_template_dialogues_have_the_simple_form(tokenizer_kind):
    tokenizer: Any = make_tokenizer(tokenizer_kind, None)
    text = "<s>Be kind.\nUser: What is it?\nAssistant: Hello there</s>User: So?\nAssistant: no</s>"
    spans = [(begin, begin + len(said)) for said in (" Hello there</s>", " no</s>") for begin in [text.index(said)]]
    dialogue = [system("Be kind."), *DIALOGUE[:2], *DIALOGUE[4:]]
    form = DialogueFormat(tokenizer)
    assert form.encode(dialogue) == labels_of(tokenizer, text, spans)
    assert form.prompt(dialogue[:2]) == tokenizer(text[: text.index(" Hello")], add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(form.end_ids) == ["</s>"]
    template = make_tokenizer(tokenizer_kind, CHATML)
    assert DialogueFormat(template, use_chat_template=False).encode(dialogue) == form.encode(dialogue)
    with pytest.raises(DataError, match="the simple form has no turns of tool"):
        form.encode([*dialogue, Message(role="tool", content="fox")])


def test_without_an_eos_a_line_break_ends_a_turn():
    tokenizer: Any = make_tokenizer("byte_level", None)
    tokenizer.eos_token = None
    form = DialogueFormat(tokenizer)
    assert tokenizer.decode(form.end_ids) == "\n"
    _, labels = form.encode(DIALOGUE[:2])
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == " Hello there\n"


def test_turns_of_weight_0_are_not_learnt():
    tokenizer: Any = make_tokenizer("byte_level", CHATML, "<|im_end|>")
    dialogue = [user("So?"), Message(role="assistant", content="no", weight=0), user("So?"), assistant("yes!")]
    ids, labels = DialogueFormat(tokenizer).encode(dialogue)
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "yes!<|im_end|>"
    assert ids == tokenizer.apply_chat_template(dialogue, return_dict=False)


def test_who_speaks_first_may_be_the_assistant():
    tokenizer: Any = make_tokenizer("byte_level", CHATML, "<|im_end|>")
    _, labels = DialogueFormat(tokenizer).encode([assistant("Hello there"), user("So?"), assistant("no")])
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "Hello there<|im_end|>no<|im_end|>"


@pytest.mark.parametrize(
    ("template", "dialogue", "reason"),
    [
        (GEMMA, [system("Be kind."), *DIALOGUE], "System role not supported"),
        (MISTRAL, [system("Be kind."), *DIALOGUE], ALTERNATE),
    ],
)
def test_the_systems_text_can_be_put_into_the_first_user_turn(template, dialogue, reason):
    tokenizer: Any = make_tokenizer("byte_level", template)
    with pytest.raises(DataError) as refused:
        DialogueFormat(tokenizer).encode(dialogue)
    assert reason in str(refused.value)
    assert "merge_system=True (chat: --merge-system)" in str(refused.value)
    form = DialogueFormat(tokenizer, merge_system=True)
    merged = [user("Be kind.\n\nWhat is it?"), *DIALOGUE[1:]]
    assert form.encode(dialogue) == DialogueFormat(tokenizer).encode(merged)
    assert form.prompt(dialogue[:2]) == DialogueFormat(tokenizer).prompt(merged[:1])


@pytest.mark.parametrize("dialogue", [[assistant("Hello there"), *DIALOGUE], [user("So?"), *DIALOGUE],
                                      [system("Be kind."), user("So?"), *DIALOGUE]])  # fmt: skip
def test_what_a_template_refuses_is_one_line(dialogue):
    with pytest.raises(DataError) as refused:
        DialogueFormat(make_tokenizer("byte_level", GEMMA), merge_system=True).encode(dialogue)
    assert str(refused.value) == (
        f"the chat template refuses the dialogue ({ALTERNATE}); change it, or use the simple form with "
        "use_chat_template=False (chat: --no-chat-template)"
    )


def test_templates_whose_answers_cannot_be_told_are_refused():
    """Neither behind the prompt nor in one piece: this one writes the length of the answer in front."""
    template = "{{ messages[-1].content | length }}" + CHATML
    with pytest.raises(DataError, match=r"answer 'no' cannot be found; use_chat_template=False"):
        DialogueFormat(make_tokenizer("byte_level", template)).encode(DIALOGUE[4:])


def test_templates_that_leave_out_what_is_said_are_refused():
    """As those that go through lists of parts, and find none in a text."""
    parts = CHATML.replace("message['content']", "(message['content'] | selectattr('text', 'defined') | join)")
    with pytest.raises(DataError, match=r"omits the messages' contents .*use_chat_template=False"):
        DialogueFormat(make_tokenizer("byte_level", parts, "<|im_end|>")).encode(DIALOGUE)


@pytest.mark.parametrize("tokenizer_kind", TOKENIZERS)
def test_a_template_that_marks_what_is_generated_is_read_as_any_other(tokenizer_kind):
    """Its own mark agrees with what we find."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer: Any = make_tokenizer(tokenizer_kind, template, "<|im_end|>")
    ids, labels = DialogueFormat(tokenizer).encode(DIALOGUE)
    assert ids == tokenizer.apply_chat_template(DIALOGUE, return_dict=False)
    marked = tokenizer.apply_chat_template(DIALOGUE, return_dict=True, return_assistant_tokens_mask=True)
    if tokenizer_kind == "byte_level":  # with others transformers' mask is a position off where a blank is put in front
        assert [label != IGNORED for label in labels] == [bool(mark) for mark in marked["assistant_masks"]]
    assert "no" in tokenizer.decode([label for label in labels if label != IGNORED])


def test_of_several_templates_the_default_one_is_taken():
    tokenizer: Any = make_tokenizer("byte_level", CHATML, "<|im_end|>")
    expected = DialogueFormat(tokenizer).encode(DIALOGUE)
    tokenizer.chat_template = {"default": CHATML, "tool_use": GEMMA}
    assert DialogueFormat(tokenizer).encode(DIALOGUE) == expected
    tokenizer.chat_template = {"tool_use": GEMMA, "rag": CHATML}
    with pytest.raises(DataError, match="multiple chat templates"):
        DialogueFormat(tokenizer).encode(DIALOGUE)

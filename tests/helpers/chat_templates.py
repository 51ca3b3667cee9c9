"""Chat templates as public models have them, shortened where tools and dates are concerned, and tokenizers to use them.

Control tokens are spelt as the models spell them.
"""
# ruff: noqa: E501 (templates stand as they are published)

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ALTERNATE = "Conversation roles must alternate user/assistant/user/assistant/..."

CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

# Of version 0.3 and Nemo: what the system says stands in the user's turn if that is the last turn of all.
MISTRAL_V3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}"""

QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in message.content %}
                {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
                {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

_DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}{% if add_generation_prompt %}{{'<｜Assistant｜>THINK'}}{% endif %}"""
DEEPSEEK_V3, DEEPSEEK_R1 = _DEEPSEEK.replace("THINK", ""), _DEEPSEEK.replace("THINK", "<think>\\n")

PHI3 = """{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

NUMBERED = """{% for message in messages %}{{ loop.index ~ '. ' + message.role + ': ' + message.content + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ (messages | length + 1) ~ '. assistant:' }}{% endif %}"""
"""Writes each turn's number."""

COUNTED = """{{ '(' ~ messages | length ~ ' turns)\n' }}{% for message in messages %}{{ message.role + ': ' + message.content + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
"""Writes the number of turns in front, which is another one when the answer is there."""

TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "<eos>"),
    "mistral": (MISTRAL, "</s>"),
    "mistral_v3": (MISTRAL_V3, "</s>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "deepseek_v3": (DEEPSEEK_V3, "<｜end▁of▁sentence｜>"),
    "deepseek_r1": (DEEPSEEK_R1, "<｜end▁of▁sentence｜>"),
    "phi3": (PHI3, "<|endoftext|>"),
    "numbered": (NUMBERED, "</s>"),
    "counted": (COUNTED, "</s>"),
}
"""Template and the tokenizer's eos by kind."""

_CONTROL = ["<pad>", "<unk>", "<s>", "</s>", "<eos>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
            "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<｜User｜>", "<｜Assistant｜>",
            "<｜end▁of▁sentence｜>", "<|endoftext|>"]  # fmt: skip
_CONTROL_RSTRIP = [
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
]  # as Phi-3's: take the blanks behind them along
_VISIBLE = ["<think>", "</think>"]  # as Qwen3's: tokens of their own, but not special
_CORPUS = [
    "The quick brown fox says no. yes! user: assistant: system model turns\n\n [INST] [/INST] What is it? Hello there"
] * 2

TOKENIZERS = ("byte_level", "byte_level_with_prefix_space", "llama2", "metaspace")


def make_tokenizer(kind: str, template: str | None, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A small trained BPE of one of `TOKENIZERS`; the last two put a blank in front of texts, as SentencePiece does."""
    if kind.startswith("byte_level"):
        prefix = kind != "byte_level"
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if kind == "llama2":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = ["▁", "\n", *map(chr, range(33, 127))]
        whole, made.pre_tokenizer = made.pre_tokenizer, pre_tokenizers.Metaspace()  # no pieces of several words
    bytes_of_others = [] if kind.startswith("byte_level") else [f"<0x{byte:02X}>" for byte in range(256)]
    control = [*_CONTROL, *(AddedToken(token, rstrip=True, special=True) for token in _CONTROL_RSTRIP)]
    trainer = trainers.BpeTrainer(
        vocab_size=520 + len(bytes_of_others), initial_alphabet=alphabet, special_tokens=[*control, *bytes_of_others]
    )
    made.train_from_iterator(_CORPUS, trainer)
    if not kind.startswith("byte_level"):
        made.pre_tokenizer = whole
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token=eos,
        additional_special_tokens=[token for token in control if token not in ("<pad>", "<unk>", "<s>", eos)],
    )  # fmt: skip
    tokenizer.add_tokens(_VISIBLE)
    tokenizer.chat_template = template
    return tokenizer

"""The text decoder inside a multimodal model gives through a swarm what the whole model gives for text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from petals_lightning.hf import find_blocks
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.hf.decoder import text_decoder_in
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    prompts_of,
)
from petals_lightning.models.local import LocalModelForSequenceClassification
from tests.helpers.families import WRAPPER_CONFIGS, save_tiny_checkpoint
from tests.helpers.parity import UNEVEN, P, assert_same_gradients, pair, right_padded_batch
from tools.testing.tensors import relative_error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    """`wrapper("gemma3")` is the folder of a tiny random model and the model as transformers loads it."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(family: str) -> tuple[Path, Any]:
        if family not in made:
            folder = save_tiny_checkpoint(WRAPPER_CONFIGS[family](), tmp_path_factory.mktemp(family))
            with quiet_transformers():
                # The wrapper of Llama 4 fails on texts in transformers 5.24.
                auto_class = AutoModelForCausalLM if family == "llama4" else AutoModelForImageTextToText
                made[family] = folder, auto_class.from_pretrained(folder).eval()
        return made[family]

    return make


def with_prompts(plain: Any, prompts: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [B, S, V] of the whole model with deep prompts concatenated, and the leaves that gradients are for."""
    leaves = [prompts.input.detach().clone().requires_grad_(), prompts.deep.detach().clone().requires_grad_()]
    text = text_decoder_in(plain, plain.config.get_text_config())[1]

    def adding(index: int) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (torch.cat([args[0][:, :P] + leaves[1][index], args[0][:, P:]], dim=1), *args[1:])

        return add

    hooks = [
        block.register_forward_pre_hook(adding(index)) for index, block in enumerate(find_blocks(text).blocks(text))
    ]
    embeds = plain.get_input_embeddings()(batch["input_ids"])
    embeds = torch.cat([leaves[0].expand(len(embeds), -1, -1), embeds], dim=1)
    mask = nn.functional.pad(batch["attention_mask"], (P, 0), value=1)
    logits = plain(inputs_embeds=embeds, attention_mask=mask).logits[:, P:]
    for hook in hooks:
        hook.remove()
    return logits, leaves


@pytest.mark.parametrize("family", WRAPPER_CONFIGS)
def test_logits_gradients_and_text_are_those_of_the_whole_model(family, wrapper, start_swarm):
    folder, plain = wrapper(family)
    swarm = start_swarm(folder, UNEVEN)
    model = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True, tuning_mode="deep_ptune", pre_seq_len=P)
    prompts = prompts_of(model)
    with torch.no_grad():
        prompts.deep.normal_(0, 0.3)
    batch = right_padded_batch()
    del batch["labels"]
    real = batch["attention_mask"].bool()
    logits, (expected, leaves) = model(**batch).logits[real], with_prompts(plain, prompts, batch)
    assert relative_error(logits, expected[real]) < 1e-5
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected[real] * weights).sum().backward()
    for got, leaf in zip((prompts.input, prompts.deep), leaves, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.norm() > 1e-6, "the test is blind"
        assert relative_error(got.grad, leaf.grad) < 1e-5

    untuned = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True)
    order = batch["attention_mask"].argsort(dim=1, stable=True)  # padding on the left
    given = {name: value.gather(1, order) for name, value in batch.items()}
    greedy = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        assert torch.equal(untuned.generate(**given, **greedy), plain.generate(**given, **greedy))


@pytest.mark.parametrize("mode", [None, "deep_ptune"])
@pytest.mark.parametrize("family", ["gemma3", "mistral3", "qwen2_vl"])
def test_a_classifier_of_texts_equals_a_local_one(family, mode, wrapper, start_swarm):
    """Also where transformers has no classifier of this kind (Qwen2-VL)."""
    folder, plain = wrapper(family)
    swarm = start_swarm(folder, UNEVEN)
    classes = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification
    remote, local = pair(*classes, folder, swarm, mode, num_labels=3, pad_token_id=0)
    batch, outputs = right_padded_batch(), []
    for model in (remote, local):
        output = model(**batch)
        output.loss.backward()
        outputs.append(output)
    assert relative_error(outputs[0].logits, outputs[1].logits) < 1e-5
    assert_same_gradients(remote, local, 1e-5)
    if mode is None:
        text = text_decoder_in(plain, plain.config.get_text_config())[1]
        hidden = text(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        last = hidden[torch.arange(5), batch["attention_mask"].sum(1) - 1]
        assert relative_error(outputs[0].logits, remote.score(last)) < 1e-5


def test_a_classifier_of_texts_equals_that_of_the_wrapper(wrapper, start_swarm):
    folder, _ = wrapper("gemma3")
    remote = start_swarm(folder, UNEVEN).load(
        AutoDistributedModelForSequenceClassification, shared_peer=True, num_labels=3, pad_token_id=0
    )
    config = AutoConfig.from_pretrained(folder)
    config.num_labels = config.text_config.num_labels = 3
    with quiet_transformers():
        plain = AutoModelForSequenceClassification.from_pretrained(folder, config=config).eval()
    plain.score.load_state_dict(remote.score.state_dict())
    batch = right_padded_batch()
    del batch["labels"]
    assert relative_error(remote(**batch).logits, plain(**batch).logits) < 1e-5

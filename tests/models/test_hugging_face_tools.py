"""What the Hugging Face world does with a model object: Trainer, accelerate, pipeline, generate's other inputs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import Accelerator

from petals_lightning.models import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from petals_lightning.models.local import LocalModelForCausalLM, LocalModelForSequenceClassification
from tests.helpers.families import VOCAB
from tests.helpers.parity import right_padded_batch
from tests.helpers.samples import Samples
from tools.testing.tensors import relative_error

pytestmark = pytest.mark.slow

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
TASKS = {
    "classification": (AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification),
    "language modelling": (AutoDistributedModelForCausalLM, LocalModelForCausalLM),
}


def losses_by_trainer(model, samples, folder):
    """Losses of each of six steps with Hugging Face's defaults, and of the evaluation."""
    settings = tf.TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], save_strategy="no", eval_strategy="epoch", use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    trainer = tf.Trainer(model, settings, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    history = trainer.state.log_history
    return [[entry[name] for entry in history if name in entry] for name in ("loss", "eval_loss")]


@pytest.mark.parametrize("task", TASKS)
def test_trainer_reaches_the_local_losses(task, tiny_checkpoint, start_swarm, tmp_path):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, 2), (2, 4)])
    options: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": 3}
    if task == "classification":
        options |= {"num_labels": 3, "pad_token_id": 0}
    remote, local = TASKS[task]
    samples = Samples(task == "classification")
    found = []
    for load in (
        lambda: swarm.load(remote, shared_peer=True, **options),
        lambda: local.from_pretrained(str(checkpoint), **options),
    ):
        torch.manual_seed(1)
        found.append(losses_by_trainer(load(), samples, tmp_path))
    assert len(found[0][0]) == 6
    assert len(found[0][1]) == 2
    for got, expected in zip(*found, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    assert found[0][0][-1] < found[0][0][0], "the test is blind: nothing was learnt"


def test_the_familys_own_parameters_are_shown(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)])
    families: list[tuple[Any, Any]] = [
        (AutoDistributedModelForSequenceClassification, tf.LlamaForSequenceClassification),
        (AutoDistributedModelForCausalLM, tf.LlamaForCausalLM),
    ]
    for auto, family in families:
        model = swarm.load(auto, shared_peer=True)
        assert inspect.signature(type(model).forward) == inspect.signature(family.forward)
        shown = inspect.signature(type(model).prepare_inputs_for_generation) if model.can_generate() else None
        assert shown is None or shown == inspect.signature(family.prepare_inputs_for_generation)


def test_positional_arguments_are_the_familys(tiny_checkpoint, start_swarm):
    swarm, batch = start_swarm(tiny_checkpoint("llama"), [(0, 4)]), right_padded_batch()
    model = swarm.load(AutoDistributedModelForSequenceClassification, shared_peer=True, num_labels=3, pad_token_id=0)
    by_name = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, by_name)


def test_accelerate_prepares_a_model(tiny_checkpoint, start_swarm):
    swarm, batch = start_swarm(tiny_checkpoint("llama"), [(0, 4)]), right_padded_batch()
    options = {"num_labels": 3, "pad_token_id": 0, "tuning_mode": "ptune", "pre_seq_len": 2}
    model = swarm.load(AutoDistributedModelForSequenceClassification, shared_peer=True, **options)
    expected = model(**batch).loss
    accelerator = Accelerator(cpu=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    loss = prepared(**batch).loss
    assert torch.allclose(loss, expected)
    accelerator.backward(loss)
    optimizer.step()
    assert prepared(**batch).loss < loss


def test_pipelines_run(text_model, start_swarm):
    swarm = start_swarm(text_model, [(0, 2), (2, 4)])
    tokenizer = tf.AutoTokenizer.from_pretrained(text_model)
    texts = ["w1 w2 w3", "w4 w5"]
    causal, plain = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True), tf.AutoModelForCausalLM
    options = {"max_new_tokens": 4, "do_sample": False}
    found = tf.pipeline("text-generation", causal, tokenizer=tokenizer)(texts, **options)
    expected = tf.pipeline("text-generation", plain.from_pretrained(text_model), tokenizer=tokenizer)(texts, **options)
    assert found == expected
    classifier = swarm.load(
        AutoDistributedModelForSequenceClassification, shared_peer=True, num_labels=3, pad_token_id=0
    )
    tokenizer = tf.AutoTokenizer.from_pretrained(text_model)  # the other pipeline pads on the left from here on
    scores: Any = tf.pipeline("text-classification", classifier, tokenizer=tokenizer)(texts, top_k=None)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    expected_scores = classifier(inputs["input_ids"], inputs["attention_mask"]).logits.softmax(-1)
    for got, row in zip(scores, expected_scores, strict=True):
        by_label = {entry["label"]: entry["score"] for entry in got}
        assert [by_label[f"LABEL_{number}"] for number in range(3)] == pytest.approx(row.tolist(), rel=1e-4)


def test_generate_takes_embeddings_and_no_cache(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 2), (2, 4)])
    model = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True)
    plain = tf.AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval()
    ids = torch.randint(1, VOCAB, (2, 7))
    embeds = plain.get_input_embeddings()(ids).detach()
    for inputs in ({"inputs_embeds": embeds}, {"inputs": ids, "use_cache": False}, {"inputs": ids}):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))


def test_outputs_hold_nothing_of_ours(tiny_checkpoint, start_swarm):
    """Tools walk over a model's output: what Hugging Face does not put there must not be there."""
    swarm, batch = start_swarm(tiny_checkpoint("llama"), [(0, 4)]), right_padded_batch()
    model = swarm.load(AutoDistributedModelForSequenceClassification, shared_peer=True, num_labels=3, pad_token_id=0)
    assert list(model(**batch)) == ["loss", "logits"]
    as_tuple = model(**batch, return_dict=False)
    assert len(as_tuple) == 2
    assert relative_error(as_tuple[1], model(**batch).logits) < 1e-5

"""Classes by words: logits, losses and gradients are plain Hugging Face's, here and through a swarm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from petals_lightning.data import TextClassificationDataModule, load_tokenizer
from petals_lightning.errors import ConfigurationError
from petals_lightning.models import prompts_of, remote_blocks
from petals_lightning.modules import VerbalizedClassificationModule
from petals_lightning.strategies import PrivateSwarm, RemoteBlockStrategy
from tests.helpers.families import HIDDEN
from tests.helpers.lightning import Losses, make_trainer
from tools.testing.swarms import PREFIX, InProcessSwarm
from tools.testing.tensors import relative_error

TEMPLATE = "w1 {text} w2 w3"
BAD, GREAT = 20, 21  # tokens of w17 and w18


def make(text_model: Path, **settings: Any) -> VerbalizedClassificationModule:
    torch.manual_seed(0)
    defaults = {"verbalizer": {0: "w17", 1: "w18"}, "pre_seq_len": 3, "dht_prefix": PREFIX, "lr": 0.05}
    return VerbalizedClassificationModule(str(text_model), **{**defaults, **settings})


@pytest.fixture
def answers(text_model: Path, texts: Path) -> TextClassificationDataModule:
    """Texts in a template, in batches of 8."""
    return TextClassificationDataModule(str(text_model), str(texts), batch_size=8, template=TEMPLATE)


def test_results_are_those_of_plain_hugging_face(text_model, answers, tmp_path) -> None:
    module = make(text_model, tuning_mode="ptune")
    make_trainer(tmp_path).validate(module, datamodule=answers, verbose=False)
    batch = next(iter(answers.train_dataloader()))
    output = module(**batch)
    output.loss.backward()
    got = prompts_of(module).input

    plain = AutoModelForCausalLM.from_pretrained(text_model)
    start = got.detach().clone().requires_grad_()
    lengths = batch["attention_mask"].sum(1)
    expected = []
    for ids, length in zip(batch["input_ids"], lengths, strict=True):  # one by one, without padding
        embeds = torch.cat([start, plain.get_input_embeddings()(ids[:length])])
        expected.append(plain(inputs_embeds=embeds[None]).logits[0, -1, [BAD, GREAT]])
    loss = torch.nn.functional.cross_entropy(torch.stack(expected), batch["labels"])
    loss.backward()
    assert len(set(lengths.tolist())) > 1, "the test is blind"
    assert start.grad is not None
    assert got.grad is not None
    assert relative_error(output.logits, torch.stack(expected)) < 1e-5
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative_error(got.grad, start.grad) < 1e-5


@pytest.mark.slow
def test_training_through_a_swarm_equals_a_local_run(
    text_model, answers, tmp_path, start_swarm: Callable[..., InProcessSwarm]
) -> None:
    swarm = start_swarm(text_model, [(0, 1), (1, 4)])
    remote, local = Losses(), Losses()
    make_trainer(tmp_path, local).fit(make(text_model), datamodule=answers)
    strategy = RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers))
    trainer, module = make_trainer(tmp_path, remote, strategy=strategy), make(text_model)  # which seeds the prompts
    trainer.fit(module, datamodule=answers)
    assert remote.values == pytest.approx(local.values, abs=1e-4)
    assert {"val/accuracy", "val/macro_f1", "val/matthews", "val/loss"} <= trainer.callback_metrics.keys()
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert trained == {"model.model.prompts.input", "model.model.prompts.deep"}


@pytest.mark.slow
def test_only_the_answers_position_is_fetched(text_model, answers, tmp_path, start_swarm) -> None:
    swarm = start_swarm(text_model, [(0, 4)])
    received = []

    class Traffic(Losses):
        def on_validation_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            received.append(remote_blocks(module.model).stats.bytes_received)

    trainer = make_trainer(tmp_path, Traffic(), strategy=RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers)))
    trainer.validate(make(text_model, tuning_mode="ptune"), datamodule=answers, verbose=False)
    assert received[0] < 16 * 4 * HIDDEN * 4  # 16 texts of about ten tokens: less than four positions of each


def test_predictions_need_no_labels(text_model, answers, tmp_path) -> None:
    module = make(text_model, class_names=["bad", "good"], verbalizer={"good": "w18", "bad": "w17"})
    batches: Any = make_trainer(tmp_path).predict(module, datamodule=answers)
    assert [batch["probabilities"].shape for batch in batches] == [(16, 2)]
    assert module.words == ["w17", "w18"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuning_mode": None}, "tuning_mode=None: a language model has no head to train"),
        ({"verbalizer": {0: "w1"}}, "verbalizer has the classes 0, the data have 0, 1"),
        ({"verbalizer": {0: "w1", 2: "w2"}}, "verbalizer has the classes 0, 2, the data have 0, 1"),
        ({"verbalizer": {0: "w1", "0": "w3", 1: "w2"}}, "verbalizer has the classes 0, 0, 1, the data have 0, 1"),
        ({"verbalizer": ["w1", "w2"]}, r"verbalizer is \['w1', 'w2'\]: it must map each class to a word"),
        ({"verbalizer": {0: "w1", 1: ""}}, "it must map each class to a word"),
        ({"class_names": ["1", "0"]}, "names and numbers in different orders"),
    ],
)
def test_words_that_do_not_fit_the_classes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(Path("model"), **settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("w17 w18", "w19"), "verbalizer: 'w17 w18' must be one token of .*, and is 'w17', 'w18'"),
        (("w17", "unheard"), "verbalizer: 'unheard' must be one token of .*, and is '<unk>'"),
        (("w17", " w17"), "verbalizer: 'w17' and ' w17' are the same token"),
    ],
)
def test_words_that_are_no_token_are_refused(words, message, text_model, answers, tmp_path) -> None:
    module = make(text_model, verbalizer=dict(enumerate(words)))
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(tmp_path).validate(module, datamodule=answers, verbose=False)


def test_data_without_a_template_are_refused(text_model, data, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"template=None: the words of a verbalizer follow a template"):
        make_trainer(tmp_path).validate(make(text_model), datamodule=data, verbose=False)


# --- templates -------------------------------------------------------------------------------------------------------


def test_texts_are_put_into_the_template(text_model, texts, answers) -> None:
    plain = TextClassificationDataModule(str(text_model), str(texts))
    for data in (plain, answers):
        data.setup()
    w1, *end = load_tokenizer(str(text_model))("w1 w2 w3")["input_ids"]
    for bare, sample in zip(plain._splits["test"].input_ids, answers._splits["test"].input_ids, strict=True):
        assert sample == [w1, *bare, *end]


def test_a_text_that_is_too_long_is_cut_and_not_the_template(text_model, texts) -> None:
    lengths = []
    for limit in (100, 6):
        data = TextClassificationDataModule(str(text_model), str(texts), template=TEMPLATE, max_length=limit)
        data.setup()
        lengths.append(data.longest)
        for sample in data._splits["test"].input_ids:
            assert (sample[0], sample[-2:]) == (4, [5, 6])
    assert lengths[0] > lengths[1] == 6
    with pytest.raises(ConfigurationError, match="max_length=3: the template alone has 3 tokens"):
        TextClassificationDataModule(str(text_model), str(texts), template=TEMPLATE, max_length=3).setup()


@pytest.mark.parametrize("template", ["It was", "{text} {text}", "{text} {answer}", "{text", "{text!r}", "{}", ""])
def test_a_template_without_its_text_is_refused(template: str, text_model: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^template=.*: must have \{text\} once and no other field"):
        TextClassificationDataModule(str(text_model), template=template)


def test_a_template_of_pairs_is_refused(text_model: Path) -> None:
    with pytest.raises(ConfigurationError, match="a template takes one text of each sample"):
        TextClassificationDataModule(str(text_model), template="{text}", text_pair_column="other")

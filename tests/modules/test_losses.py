"""Losses besides cross-entropy: plain formulas, and the losses and gradients of PEFT on the local model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from petals_lightning.data import DialogueDataModule, PreferenceDataModule, TextLabelSetDataModule, TextNumberDataModule
from petals_lightning.errors import ConfigurationError
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    lora_of,
    prompts_of,
)
from petals_lightning.models.local import LocalModelForCausalLM
from petals_lightning.models.trainable import without_tuning
from petals_lightning.modules import (
    DistillationModule,
    MultiLabelModule,
    PreferenceModule,
    RegressionModule,
    RewardModule,
)
from petals_lightning.modules.distillation import distillation_loss
from petals_lightning.modules.preference import preference_loss
from petals_lightning.sample import MODEL_DIR
from petals_lightning.strategies import PrivateSwarm, RemoteBlockStrategy
from tests.helpers.lightning import make_trainer
from tests.helpers.lora import by_peft, factors_of_peft, move_off_zero
from tests.helpers.parity import UNEVEN, right_padded_batch
from tools.testing.swarms import PREFIX
from tools.testing.tensors import relative_error

LORA = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def pairs() -> dict[str, torch.Tensor]:
    """Three pairs; the labels are of the last three tokens of each answer, which have other lengths."""
    batch = right_padded_batch(batch=6)
    ends = batch["attention_mask"].sum(1)
    positions = torch.arange(batch["input_ids"].shape[1])
    is_answer = (positions >= (ends - 3)[:, None]) & (positions < ends[:, None])
    return batch | {"labels": batch["input_ids"].masked_fill(~is_answer, -100)}


def remote_and_peft(checkpoint: Any, swarm: Any, task: str, **options: Any) -> tuple[Any, Any]:
    """Our model through the swarm and PEFT's, with the same LoRA and head."""
    auto: Any = {"causal": AutoDistributedModelForCausalLM, "classifier": AutoDistributedModelForSequenceClassification}
    plain: Any = {"causal": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}
    remote = swarm.load(auto[task], shared_peer=True, tuning_mode="lora", lora=LORA, **options)
    peft = by_peft(checkpoint, LORA, plain[task], **options).eval()
    factors = factors_of_peft(peft)
    with torch.no_grad():
        for name, parameter in lora_of(remote).named_parameters():
            parameter.copy_(factors[name])
    if task == "classifier":
        head = peft.get_submodule("base_model.model.score")
        head.load_state_dict(remote.score.state_dict())
        head.requires_grad_(True)
    return remote, peft


def assert_same(remote: Any, peft: Any, loss: torch.Tensor, expected: torch.Tensor) -> None:
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    factors = factors_of_peft(peft)
    for name, parameter in lora_of(remote).named_parameters():
        expected_grad = factors[name].grad
        assert expected_grad is not None
        assert expected_grad.norm() > 1e-8, "the test is blind"
        assert relative_error(parameter.grad, expected_grad) < 1e-5, name
    if hasattr(remote, "score"):
        head = peft.get_submodule("base_model.model.score")
        assert relative_error(remote.score.weight.grad, head.weight.grad) < 1e-5


def with_model(module: Any, model: Any) -> Any:
    module.model = model
    return module


def plain_log_probabilities(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As TRL computes them: log-softmax of all positions, shifted, masked, summed."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    each = logits.log_softmax(-1).gather(2, labels.clamp_min(0)[:, :, None])[:, :, 0]
    return (each * (labels != -100)).sum(1)


@pytest.mark.slow
def test_preferences_equal_peft_with_its_adapter_off_as_reference(tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint("llama"), pairs()
    remote, peft = remote_and_peft(checkpoint, start_swarm(checkpoint, UNEVEN), "causal")
    found = with_model(PreferenceModule(str(checkpoint), tuning_mode="lora", r=2, beta=0.5), remote)(**batch)
    policy = plain_log_probabilities(peft, batch)
    with torch.no_grad(), peft.disable_adapter():
        reference = plain_log_probabilities(peft, batch)
    gained = policy - reference
    expected = -torch.log(torch.sigmoid(0.5 * (gained[:3] - gained[3:]))).mean()
    assert torch.allclose(found.margins, 0.5 * (gained[:3] - gained[3:]), atol=1e-4)
    assert_same(remote, peft, found.loss, expected)


def test_untrained_preferences_have_the_loss_of_a_coin():
    policy = torch.randn(8)
    assert preference_loss(policy, policy, 0.1).loss.item() == pytest.approx(math.log(2))
    better = preference_loss(policy + torch.tensor([1.0] * 4 + [-1.0] * 4), policy, 0.1)
    assert better.loss < math.log(2)
    assert torch.allclose(better.margins, torch.full((4,), 0.2), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ptune", "deep_ptune", "prefix"])
def test_without_tuning_prompts_and_lora_do_not_act(mode, tiny_checkpoint, start_swarm):
    checkpoint, ids = tiny_checkpoint("gpt2"), right_padded_batch()["input_ids"][:1]
    config = LoraConfig(r=2, target_modules="all-linear")
    swarm = start_swarm(checkpoint, UNEVEN)
    options: dict[str, Any] = {"tuning_mode": mode, "pre_seq_len": 3, "lora": config}
    plain = AutoModelForCausalLM.from_pretrained(str(checkpoint)).eval()
    for model in (
        swarm.load(AutoDistributedModelForCausalLM, **options),
        LocalModelForCausalLM.from_pretrained(str(checkpoint), **options),
    ):
        move_off_zero(dict(lora_of(model).named_parameters()))
        tuned = model(ids).logits
        with without_tuning(model):
            assert relative_error(model(ids).logits, plain(ids).logits) < 1e-5
        assert torch.equal(model(ids).logits, tuned)
        assert relative_error(tuned, plain(ids).logits) > 1e-2
        assert prompts_of(model).is_off is False


@pytest.mark.slow
def test_rewards_equal_peft(tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint("llama"), pairs()
    remote, peft = remote_and_peft(checkpoint, start_swarm(checkpoint, UNEVEN), "classifier", num_labels=1)
    found = with_model(RewardModule(str(checkpoint), tuning_mode="lora", r=2), remote)(**batch)
    rewards = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert_same(remote, peft, found.loss, -torch.log(torch.sigmoid(rewards[:3] - rewards[3:])).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "labels", "loss"),
    [
        (RegressionModule, torch.randn(5), lambda logits, y: (logits[:, 0] - y).square().mean()),
        (
            MultiLabelModule,
            torch.randint(0, 2, (5, 3)).float(),
            lambda logits, y: -(y * logits.sigmoid().log() + (1 - y) * (-logits).sigmoid().log()).mean(),
        ),
    ],
    ids=["regression", "multi-label"],
)
def test_other_targets_equal_peft(module, labels, loss, tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch() | {"labels": labels}
    size: dict[str, Any] = {"num_labels": 3} if module is MultiLabelModule else {}
    options = {"num_labels": 1, **size, "problem_type": module.problem_type}
    remote, peft = remote_and_peft(checkpoint, start_swarm(checkpoint, UNEVEN), "classifier", **options)
    output = with_model(module(str(checkpoint), tuning_mode="lora", r=2, **size), remote)(**batch)
    logits = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert_same(remote, peft, output.loss, loss(logits, labels))


@pytest.mark.parametrize("top_k", [None, 1, 4])
def test_the_loss_of_distillation_is_the_plain_formula(top_k):
    own, teacher, temperature = torch.randn(3, 9), torch.randn(3, 9), 2.0
    expected = []
    for q, p in zip((own / temperature).softmax(-1), (teacher / temperature).softmax(-1), strict=True):
        kept = p.argsort(descending=True)[:top_k]
        scaled = p[kept] / p[kept].sum()
        expected.append(sum(scaled[i] * (scaled[i].log() - q[kept[i]].log()) for i in range(len(kept))))
    found = distillation_loss(own, teacher, temperature=temperature, top_k=top_k)
    assert found.item() == pytest.approx(temperature**2 * float(sum(expected)) / 3, rel=1e-5)
    if top_k is None:
        torch_kl = torch.nn.functional.kl_div(
            (own / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), log_target=True, reduction="batchmean"
        )
        assert found.item() == pytest.approx(4 * torch_kl.item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "swarm"])
def test_distillation_equals_peft_with_a_plain_teacher(where, tiny_checkpoint, start_swarm, tmp_path):
    """The teacher is the student's model with other LoRA, which PEFT has merged into its weights."""
    checkpoint, batch = tiny_checkpoint("llama"), pairs()
    plain = by_peft(checkpoint, LORA, AutoModelForCausalLM).eval().merge_and_unload()
    plain.save_pretrained(tmp_path)
    swarm = start_swarm(checkpoint, UNEVEN)
    remote, peft = remote_and_peft(checkpoint, swarm, "causal")
    with torch.no_grad():
        for each in (*lora_of(remote).parameters(), *factors_of_peft(peft).values()):
            each.mul_(0.5)
    if where == "swarm":
        teacher = start_swarm(tmp_path, UNEVEN).load(AutoDistributedModelForCausalLM)
    else:
        teacher = LocalModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    module = DistillationModule(
        str(checkpoint), teacher=str(tmp_path), tuning_mode="lora", r=2, temperature=2.0, share=0.7
    )
    module._teacher[:] = [teacher]
    found = with_model(module, remote).distil(**batch)
    targets = batch["labels"][:, 1:]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own, wanted = (model(**inputs).logits[:, :-1][targets != -100] for model in (peft, plain))
    divergence = torch.nn.functional.kl_div(
        (own / 2).log_softmax(-1), (wanted.detach() / 2).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence > 1e-4, "the test is blind"
    cross_entropy = torch.nn.functional.cross_entropy(own, targets[targets != -100])
    assert_same(remote, peft, found, 0.7 * 4 * divergence + 0.3 * cross_entropy)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "swarm"])
def test_a_distilled_model_comes_closer_to_its_teacher(where, start_swarm, tmp_path):
    """The teacher is the bundled model with LoRA, which the student has to find."""
    teacher = get_peft_model(AutoModelForCausalLM.from_pretrained(str(MODEL_DIR)), LORA)
    move_off_zero(dict(factors_of_peft(teacher)), 0.05)
    teacher.save_pretrained(str(tmp_path / "teacher"))
    swarm = start_swarm(MODEL_DIR, UNEVEN)
    data = DialogueDataModule(str(MODEL_DIR), limit=8, batch_size=4, max_length=48)
    torch.manual_seed(0)
    module = DistillationModule(
        str(MODEL_DIR), teacher=str(MODEL_DIR), teacher_adapter=str(tmp_path / "teacher"), dht_prefix=PREFIX,
        teacher_dht_prefix=PREFIX if where == "swarm" else None, tuning_mode="lora", r=4, lr=5e-3,
        share=0.9, top_k=50, temperature=2.0,
    )  # fmt: skip
    trainer = make_trainer(
        tmp_path, strategy=RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers)), max_epochs=8, limit_val_batches=0
    )
    losses: list[float] = []
    setattr(module, "log_training", lambda loss, size: losses.append(loss.item()))  # noqa: B010 (mypy refuses a method)
    trainer.fit(module, datamodule=data)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert module._teacher == []
    assert not any("teacher" in name for name in module.state_dict())


SETTINGS: list[tuple[Any, dict[str, Any], str]] = [
    (PreferenceModule, {"beta": 0}, "beta=0: must be above 0"),
    (PreferenceModule, {"tuning_mode": None}, "a language model has no head to train"),
    (DistillationModule, {"teacher": "x", "temperature": 0}, "temperature=0: must be above 0"),
    (DistillationModule, {"teacher": "x", "top_k": 0}, "top_k=0: must be at least 1"),
    (DistillationModule, {"teacher": "x", "share": 2}, "share=2: must be between 0 and 1"),
]


@pytest.mark.parametrize(("module", "settings", "words"), SETTINGS)
def test_settings_out_of_range_are_refused(module, settings, words):
    with pytest.raises(ConfigurationError, match=words):
        module("model", **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "data", "score", "best"),
    [
        (PreferenceModule, PreferenceDataModule, "accuracy", 0.9),
        (RewardModule, PreferenceDataModule, "accuracy", 0.9),
        (RegressionModule, TextNumberDataModule, "pearson", 0.8),
        (MultiLabelModule, TextLabelSetDataModule, "micro_f1", 0.9),
    ],
)
def test_each_learns_the_bundled_sample(module, data, score, best, tmp_path):
    torch.manual_seed(0)
    samples = data(str(MODEL_DIR), batch_size=16, eval_batch_size=64)
    samples.setup()
    facts = {"num_labels": 2} if module is MultiLabelModule else {}
    model = module(str(MODEL_DIR), tuning_mode="lora", r=8, lr=2e-3, **facts)
    trainer = make_trainer(tmp_path, max_epochs=1, limit_train_batches=30, limit_val_batches=2, num_sanity_val_steps=0)
    trainer.fit(model, datamodule=samples)
    assert trainer.callback_metrics[f"val/{score}"] > best
    if module is MultiLabelModule:
        predicted: Any = trainer.predict(model, dataloaders=samples.val_dataloader())
        assert predicted[0].shape[1] == 2

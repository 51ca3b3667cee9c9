"""Adapters that act without being trained, held by servers or sent by the client: equal to PEFT on the local model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from petals_lightning.client import ClientConfig
from petals_lightning.errors import CheckpointError, ConfigurationError, IncompatibleServerError
from petals_lightning.hf import Checkpoint
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    remote_blocks,
)
from petals_lightning.models.local import LocalModelForCausalLM, LocalModelForSequenceClassification
from petals_lightning.models.trainable import lora_of
from petals_lightning.server.loading import load_adapters, load_span
from tests.helpers.families import NUM_BLOCKS
from tests.helpers.lora import by_peft, causal_loss, factors_of_peft, move_off_zero
from tests.helpers.parity import UNEVEN, assert_same_gradients, pair, right_padded_batch
from tests.helpers.requests import assert_a_lost_server_changes_no_gradient
from tests.helpers.tampering import assert_a_liar_is_found, chosen, tamper
from tools.testing.tensors import relative_error

ALL_LINEAR = LoraConfig(r=2, lora_alpha=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
QUERIES = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"])
NAME = "polite"
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module")
def saved(tiny_checkpoint, tmp_path_factory) -> Any:
    """`saved("llama")`: PEFT's model with an adapter, in eval mode, and the folder that PEFT has saved it in."""
    made: dict[str, tuple[PeftModel, Path]] = {}

    def make(family: str) -> tuple[PeftModel, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / NAME
            peft = by_peft(tiny_checkpoint(family), ALL_LINEAR).eval()
            peft.save_pretrained(str(folder))
            made[family] = peft, folder
        return made[family]

    return make


def causal(swarm: Any, active: Any, **options: Any) -> Any:
    return swarm.load(AutoDistributedModelForCausalLM, active_adapter=active, shared_peer=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("servers", ["ours", "petals", "mixed"], indirect=True)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_that_servers_hold_equals_peft(family, tiny_checkpoint, saved, start_swarm):
    peft, folder = saved(family)
    swarm, batch = start_swarm(tiny_checkpoint(family), UNEVEN, adapters=[[folder]] * 2), right_padded_batch()
    assert all(server.record.adapters == (NAME,) for server in swarm.servers)
    model = causal(swarm, NAME)
    real, options = batch["attention_mask"].bool(), {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        expected = causal_loss(peft, batch)[1][real]
        assert relative_error(causal_loss(model, batch)[1][real], expected) < 1e-5
        plain = causal(swarm, None)
        assert relative_error(causal_loss(plain, batch)[1][real], expected) > 1e-2, "the test is blind"
    ids = batch["input_ids"][:1]
    assert torch.equal(model.generate(ids, **options), peft.generate(input_ids=ids, **options))
    pairs = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification
    remote, local = pair(*pairs, tiny_checkpoint(family), swarm, "deep_ptune", num_labels=3, active_adapter=folder)
    for each in (remote, local):
        each(**batch).loss.backward()
    assert_same_gradients(remote, local, 1e-5)


def test_a_local_model_with_an_active_adapter_equals_peft(tiny_checkpoint, saved):
    peft, folder = saved("llama")
    local = LocalModelForCausalLM.from_pretrained(str(tiny_checkpoint("llama")), active_adapter=folder)
    ids = right_padded_batch()["input_ids"]
    assert relative_error(local(ids).logits, peft(input_ids=ids).logits) < 1e-5
    assert not any(parameter.requires_grad for parameter in local.parameters())


@pytest.mark.slow
def test_what_servers_lack_is_sent_by_a_client_that_has_it(tiny_checkpoint, saved, start_swarm, tmp_path):
    """One server holds it, one has another adapter of that name, one has none."""
    peft, folder = saved("llama")
    other = tmp_path / NAME
    by_peft(tiny_checkpoint("llama"), QUERIES).save_pretrained(str(other))
    spans, batch = [(0, 1), (1, 2), (2, 4)], right_padded_batch()
    swarm = start_swarm(tiny_checkpoint("llama"), spans, adapters=[[folder], [other], []])
    model = causal(swarm, folder)
    stats, sent = remote_blocks(model).stats, []
    with torch.no_grad():
        for _ in range(2):
            before = stats.bytes_sent
            loss, _ = causal_loss(model, batch)
            assert loss.item() == pytest.approx(causal_loss(peft, batch)[0].item(), rel=1e-5)
            sent.append(stats.bytes_sent - before)
    factors = sum(each.nbytes for name, each in factors_of_peft(peft).items() if not name.startswith("0."))
    assert 0 < sent[0] - sent[1] - factors < 3000, "the first server is sent the name only"
    swarm = start_swarm(tiny_checkpoint("llama"), spans, adapters=[[folder], [folder], []])
    with pytest.raises(IncompatibleServerError, match=r"does not hold the adapter 'polite'. Start it with --adapters"):
        causal(swarm, NAME)


def test_petals_servers_that_lack_an_adapter_are_left_out(tiny_checkpoint, saved, start_swarm):
    _, folder = saved("llama")
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], servers="petals")
    with pytest.raises(IncompatibleServerError, match="does not hold the adapter 'polite', and cannot be sent it"):
        causal(swarm, folder)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["forward", "backward", "session"])
def test_whatever_replaces_a_lost_server_has_the_adapter(phase, tiny_checkpoint, saved, start_swarm):
    """The server that is left does not hold it."""
    _, folder = saved("llama")
    batch, spans = right_padded_batch(), [(0, 2), (2, 4), (2, 4)]
    swarm = start_swarm(tiny_checkpoint("llama"), spans, adapters=[[folder], [folder], []])
    torch.manual_seed(0)
    local = LocalModelForCausalLM.from_pretrained(
        str(tiny_checkpoint("llama")), active_adapter=folder, tuning_mode="lora", lora=QUERIES
    )
    torch.manual_seed(0)
    model = causal(swarm, folder, tuning_mode="lora", lora=QUERIES)
    for each in (model, local):
        move_off_zero(dict(lora_of(each).named_parameters()))
    if phase == "session":
        ids, options = batch["input_ids"][:1], {"do_sample": False}
        expected = local.generate(ids, max_new_tokens=8, **options)
        with model.inference_session(max_length=30) as session:
            model.generate(ids, max_new_tokens=4, **options)
            swarm.by_id[session.peers[-1]].stop(timeout=0)
            session.position = ids.shape[1]
            assert torch.equal(model.generate(max_new_tokens=8, **options), expected[:, ids.shape[1] :])
        return
    assert_a_lost_server_changes_no_gradient(
        phase, swarm, model, local, lambda model: causal_loss(model, batch)[0], leg=-1
    )


@pytest.mark.slow
def test_a_trained_adapter_beside_an_active_one_equals_peft(tiny_checkpoint, saved, start_swarm):
    _, folder = saved("llama")
    batch = right_padded_batch()
    swarm = start_swarm(tiny_checkpoint("llama"), UNEVEN, adapters=[[folder], []])
    model = causal(swarm, folder, tuning_mode="lora", lora=QUERIES)
    own = dict(lora_of(model).named_parameters())
    move_off_zero(own)
    plain = AutoModelForCausalLM.from_pretrained(str(tiny_checkpoint("llama")))
    peft = PeftModel.from_pretrained(plain, str(folder), adapter_name="held").eval()
    peft.add_adapter("own", QUERIES)
    lora: Any = peft.base_model
    lora.set_adapter(["held", "own"])
    theirs = {
        name.partition("layers.")[2].removesuffix(".own.weight"): parameter
        for name, parameter in peft.named_parameters()
        if ".own." in name
    }
    assert theirs.keys() == own.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(own[name])
    losses = [causal_loss(each, batch)[0] for each in (model, peft)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for name, parameter in theirs.items():
        assert parameter.grad is not None
        assert relative_error(own[name].grad, parameter.grad) < 1e-5, name


@pytest.mark.slow
def test_audits_and_the_judge_apply_it(tiny_checkpoint, saved, start_swarm, caplog):
    peft, folder = saved("llama")
    batch, spans = right_padded_batch(), [(0, 4), (0, 4), (0, 4)]
    swarm = start_swarm(tiny_checkpoint("llama"), spans, adapters=[[folder], [], [folder]])
    model = causal(swarm, folder, client_config=ClientConfig(audit_rate=1.0, ban_period=60.0))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        expected = causal_loss(peft, batch)[0].item()
        assert causal_loss(model, batch)[0].item() == pytest.approx(expected, rel=1e-5)
        assert remote_blocks(model).stats.audits
        assert not [record for record in caplog.records if record.levelname != "INFO"]
        tamper(chosen(model, swarm), lambda hidden: hidden + 0.5 * torch.randn_like(hidden))

        def step() -> None:
            assert causal_loss(model, batch)[0].item() == pytest.approx(expected, rel=1e-5)

        assert_a_liar_is_found(step, caplog)


def of_another_model(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    cut = {name: tensor[:, :5].contiguous() for name, tensor in tensors.items()}
    save_file(cut, folder / "adapter_model.safetensors")


def of_more_blocks(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("layers.3", f"layers.{NUM_BLOCKS}"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")


def with_a_language_models_head(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors") | {"base_model.model.lm_head.weight": torch.ones(2, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")


def without_a_factor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, folder / "adapter_model.safetensors")


def of_another_kind(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


def broken(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")


WRONG: dict[Any, str] = {
    of_another_model: r"does not fit this model: .* has inputs and outputs \(5, \d+\)|for another model: LoRA of",
    of_more_blocks: "is for block 4, the model has 4",
    with_a_language_models_head: "has, besides LoRA of the blocks, base_model.model.lm_head.weight",
    without_a_factor: "lacks a factor for",
    of_another_kind: "use_dora is True, which is not supported",
    broken: "cannot be read",
}


@pytest.mark.parametrize(("change", "words"), WRONG.items(), ids=[change.__name__ for change in WRONG])
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(change, words, tiny_checkpoint, saved, tmp_path):
    folder, checkpoint = tmp_path / "copy", str(tiny_checkpoint("llama"))
    span = load_span(Checkpoint(checkpoint), 0, NUM_BLOCKS, devices=[torch.device("cpu")] * NUM_BLOCKS, dtype="auto")
    shutil.copytree(saved("llama")[1], folder)
    change(folder)
    for load in (
        lambda: load_adapters(span, Checkpoint(checkpoint), [str(folder)]),
        lambda: LocalModelForCausalLM.from_pretrained(checkpoint, active_adapter=folder),
    ):
        with pytest.raises((CheckpointError, ConfigurationError), match=words) as refused:
            load()
        assert "\n" not in str(refused.value)


def test_names_of_held_adapters_differ(tiny_checkpoint, saved):
    folder, checkpoint = str(saved("llama")[1]), Checkpoint(str(tiny_checkpoint("llama")))
    span = load_span(checkpoint, 1, 3, devices=[torch.device("cpu")] * 2, dtype="auto")
    active = load_adapters(span, checkpoint, [folder]).acting(NAME, 1, 3).active
    assert active is not None
    assert active.lora[0].blocks == (1, 2)
    with pytest.raises(ConfigurationError, match="two adapters are called 'polite'"):
        load_adapters(span, checkpoint, [folder, folder])

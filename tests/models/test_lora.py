"""LoRA through a swarm equals PEFT's on the local model: outputs, losses, and the gradients of every factor."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from petals_lightning.client import ClientConfig
from petals_lightning.errors import ConfigurationError, IncompatibleServerError, UnsupportedInputError
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    remote_blocks,
)
from petals_lightning.models.local import LocalModelForCausalLM, LocalModelForSequenceClassification
from petals_lightning.models.trainable import lora_of, trainable_state_dict
from tests.helpers.families import CAUSAL_ONLY, RECURRENT_CONFIGS, TINY_CONFIGS
from tests.helpers.lora import by_peft, causal_loss, factors_of_peft, move_off_zero
from tests.helpers.parity import UNEVEN, P, assert_same_gradients, loss_trace, right_padded_batch
from tests.helpers.requests import (
    assert_a_lost_server_changes_no_gradient,
    micro_batches,
    peer_with_the_graph,
    segment_sizes,
)
from tools.testing.tensors import relative_error

ATTENTION = LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj"])
DISTRIBUTED: dict[str, Any] = {
    "classifier": AutoDistributedModelForSequenceClassification,
    "causal": AutoDistributedModelForCausalLM,
}
ALL_LINEAR = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear")
ALL_IS_TOO_MUCH = {  # experts whose weights are one tensor; kernels that skip a linear's module
    "mixtral": ["q_proj", "v_proj"],
    "qwen3_moe": ["q_proj", "o_proj"],
    "qwen3_next": ["q_proj", "in_proj_qkvz"],
    "granitemoehybrid": ["q_proj", "in_proj"],
    "jamba": ["q_proj", "in_proj"],
    "falcon_h1": ["q_proj", "in_proj", "gate_proj"],
    "mamba": ["in_proj", "x_proj"],
    "mamba2": ["in_proj"],
}

BOUNDS = {"qwen3_5": 1e-4}  # of gradients; in one process those of float32 are 7e-5 off those of float64
pytestmark = [  # what PEFT says of models that it is made for
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def widest(family: str) -> LoraConfig:
    """LoRA of as many linears as the family allows."""
    return LoraConfig(r=2, lora_alpha=8, target_modules=ALL_IS_TOO_MUCH.get(family, "all-linear"))


def load(load_model: Any, config: Any, mode: str = "lora", **options: Any) -> Any:
    torch.manual_seed(1)
    model = load_model(tuning_mode=mode, pre_seq_len=P if mode != "lora" else None, lora=config, **options).train()
    move_off_zero(dict(lora_of(model).named_parameters()))
    return model


def remote_and_local(kind: str, checkpoint: Path, swarm: Any, config: Any, mode: str = "lora", **options: Any) -> Any:
    local = {"classifier": LocalModelForSequenceClassification, "causal": LocalModelForCausalLM}[kind]
    return (
        load(lambda **given: swarm.load(DISTRIBUTED[kind], shared_peer=True, **given), config, mode, **options),
        load(lambda **given: local.from_pretrained(str(checkpoint), **given), config, mode, **options),
    )


def assert_factors_have_the_gradients(model: Any, expected: dict[str, torch.nn.Parameter], tolerance=1e-5) -> None:
    own = dict(lora_of(model).named_parameters())
    assert own.keys() == expected.keys()
    blind = 0
    for name, parameter in expected.items():
        assert torch.equal(own[name], parameter), f"another start: {name}"
        if parameter.grad is None or parameter.grad.norm() < 1e-9:  # its linear does not run, e.g. an expert's
            assert own[name].grad is None or own[name].grad.norm() < 1e-9
            blind += 1
            continue
        assert relative_error(own[name].grad, parameter.grad) < tolerance, name
    assert blind < len(expected) / 2, "the test is blind"


@pytest.mark.parametrize("family", [*TINY_CONFIGS, *RECURRENT_CONFIGS])
def test_every_family_equals_peft(family, tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint(family), right_padded_batch()
    config = widest(family)
    if family in ALL_IS_TOO_MUCH:
        with pytest.raises(ConfigurationError, match=r"LoRA: .* (experts|kernels).*(q_proj|in_proj)"):
            LocalModelForCausalLM.from_pretrained(str(checkpoint), tuning_mode="lora", lora=ALL_LINEAR)
    swarm, real = start_swarm(checkpoint, UNEVEN), batch["attention_mask"].bool()
    remote, local = remote_and_local("causal", checkpoint, swarm, config)
    peft = by_peft(checkpoint, config).eval()
    loss, logits = causal_loss(peft, batch)
    loss.backward()
    expected = factors_of_peft(peft)
    for model in (remote, local):
        own_loss, own_logits = causal_loss(model, batch)
        own_loss.backward()
        assert relative_error(own_logits[real], logits[real]) < 1e-5
        assert own_loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert_factors_have_the_gradients(model, expected, BOUNDS.get(family, 1e-5))
    if family not in CAUSAL_ONLY:
        remote, _ = remote_and_local("classifier", checkpoint, swarm, config, num_labels=3)
        config = copy.deepcopy(config)
        config.task_type = "SEQ_CLS"
        peft = by_peft(checkpoint, config, AutoModelForSequenceClassification, num_labels=3).eval()
        head: Any = peft.get_submodule("base_model.model.score.modules_to_save.default")
        head.load_state_dict(remote.score.state_dict())
        outputs = [model(**batch) for model in (remote, peft)]
        for output in outputs:
            output.loss.backward()
        assert relative_error(outputs[0].logits, outputs[1].logits) < 1e-5
        assert outputs[0].loss.item() == pytest.approx(outputs[1].loss.item(), rel=1e-5)
        assert relative_error(remote.score.weight.grad, head.weight.grad) < 1e-5
        assert_factors_have_the_gradients(remote, factors_of_peft(peft), BOUNDS.get(family, 1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_lora_beside_prompts_equals_the_local_model(family, mode, tiny_checkpoint, start_swarm):
    """The prefix runs once and the samples run without it; gradients of LoRA come from both passes."""
    checkpoint = tiny_checkpoint(family)
    swarm = start_swarm(checkpoint, UNEVEN)
    pair = remote_and_local("classifier", checkpoint, swarm, widest(family), mode, num_labels=3)
    outputs = [model(**right_padded_batch()) for model in pair]
    for output in outputs:
        output.loss.backward()
    assert relative_error(outputs[0].logits, outputs[1].logits) < 1e-5
    assert_same_gradients(pair[0], pair[1], 1e-5)


def peft_step(checkpoint: Path, config: LoraConfig, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, Any]]:
    """PEFT's loss, and its factors with their gradients."""
    peft = by_peft(checkpoint, config).eval()
    loss, _ = causal_loss(peft, batch)
    loss.backward()
    return loss.item(), factors_of_peft(peft)


def remote_causal(swarm: Any, config: Any, **options: Any) -> Any:
    return load(lambda **given: swarm.load(AutoDistributedModelForCausalLM, **given), config, **options)


def assert_step_equals_peft(model: Any, expected: tuple[float, dict[str, Any]], batch: dict[str, torch.Tensor]) -> None:
    loss, _ = causal_loss(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert_factors_have_the_gradients(model, expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("together", [True, False], ids=["handed over", "one by one"])
def test_a_chain_of_three_and_micro_batches_equal_peft(together, tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch(batch=8)
    swarm = start_swarm(checkpoint, [(0, 1), (1, 2), (2, 4)])
    config = ClientConfig(max_microbatch_tokens=2 * 9, server_to_server=together)
    model = remote_causal(swarm, ATTENTION, client_config=config)
    loss, _ = causal_loss(model, batch)
    assert micro_batches(loss) == 4
    assert segment_sizes(loss) == ([3] if together else [1, 1, 1])
    loss.backward()
    expected = peft_step(checkpoint, ATTENTION, batch)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert_factors_have_the_gradients(model, expected[1])


@pytest.mark.slow
def test_factors_are_sent_once_a_version_and_cost_no_more_than_their_bytes(tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch(batch=8)
    swarm = start_swarm(checkpoint, UNEVEN)
    model = remote_causal(swarm, ATTENTION, client_config=ClientConfig(max_microbatch_tokens=2 * 9))
    stats, sent = remote_blocks(model).stats, []
    for change in (False, False, True):
        if change:
            move_off_zero({"lora_B": next(lora_of(model).parameters())})
        before = stats.bytes_sent
        causal_loss(model, batch)[0].backward()
        sent.append(stats.bytes_sent - before)
    factors = sum(parameter.nbytes for parameter in lora_of(model).parameters())
    assert 0 < sent[0] - sent[1] - factors < 2000
    assert 0 < sent[2] - sent[1] - factors < 2000


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["lora", "deep_ptune"])
def test_a_lost_server_is_sent_the_factors_elsewhere(phase, mode, tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch()
    swarm = start_swarm(checkpoint, [(0, 2), (0, 2), (2, 4), (2, 4)])
    remote, local = remote_and_local("causal", checkpoint, swarm, ATTENTION, mode)
    assert_a_lost_server_changes_no_gradient(phase, swarm, remote, local, lambda model: causal_loss(model, batch)[0])


@pytest.mark.slow
def test_clients_with_other_ranks_and_targets_do_not_disturb_each_other(tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch()
    swarm = start_swarm(checkpoint, UNEVEN)
    configs = [ATTENTION, ALL_LINEAR]
    models = [remote_causal(swarm, config) for config in configs]
    losses = [causal_loss(model, batch)[0] for model in models]
    for model, loss, config in zip(models, losses, configs, strict=True):
        loss.backward()
        expected = peft_step(checkpoint, config, batch)
        assert loss.item() == pytest.approx(expected[0], rel=1e-5)
        assert_factors_have_the_gradients(model, expected[1])


@pytest.mark.slow
def test_twenty_steps_give_the_loss_trace_of_peft(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, UNEVEN)
    traces = []
    for model in (remote_causal(swarm, ALL_LINEAR), by_peft(checkpoint, ALL_LINEAR).eval()):
        traces.append(loss_trace(model, lambda model, batch: causal_loss(model, batch)[0]))
    assert traces[0] == pytest.approx(traces[1], rel=1e-4)
    assert traces[0][-1] < 0.9 * traces[0][1], "the test is blind: nothing was learnt"


def test_one_seed_gives_pefts_start(tiny_checkpoint):
    config, checkpoint = copy.deepcopy(ALL_LINEAR), str(tiny_checkpoint("llama"))
    torch.manual_seed(7)
    ours = LocalModelForCausalLM.from_pretrained(checkpoint, tuning_mode="lora", lora=config)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(7)
    theirs = factors_of_peft(get_peft_model(plain, config))
    own = trainable_state_dict(ours)
    assert len(own) == len(theirs)
    for name, factor in theirs.items():
        assert torch.equal(own[f"model.lora.{name}"], factor), name
        assert (factor.norm() == 0) == name.endswith("lora_B")


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_and_its_recovery_use_the_adapter(beams, tiny_checkpoint, start_swarm):
    checkpoint, options = tiny_checkpoint("llama"), {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    swarm = start_swarm(checkpoint, [(0, 2), (2, 4), (0, 4)])
    model, peft = remote_causal(swarm, ALL_LINEAR).eval(), by_peft(checkpoint, ALL_LINEAR).eval()
    inputs = right_padded_batch(batch=2)["input_ids"][:1]
    expected = peft.generate(input_ids=inputs, **options)
    plain = AutoModelForCausalLM.from_pretrained(str(checkpoint)).generate(inputs, **options)
    assert not torch.equal(plain, expected), "the test is blind"
    with model.inference_session(max_length=40) as session:
        first = model.generate(inputs, **{**options, "max_new_tokens": 5})
        swarm.by_id[session.peers[-1]].stop(timeout=0)
        session.position = inputs.shape[1]
        assert torch.equal(model.generate(max_new_tokens=12, do_sample=False, num_beams=beams), expected[:, 9:])
    assert beams > 1 or torch.equal(first, expected[:, : first.shape[1]])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown target": (
        {"target_modules": ["qproj"]},
        r"no linear module is called 'qproj'; .* q_proj, k_proj",
    ),
    "an embedding": ({"target_modules": ["embed_tokens"]}, "no linear module is called 'embed_tokens'"),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head' is outside of the blocks"),
    "no target": ({}, "target_modules is empty"),
    "a rank above the matrix": ({"r": 17, "target_modules": ["v_proj"]}, "the rank is at most 16"),
    "dropout": ({"lora_dropout": 0.1, "target_modules": ["q_proj"]}, "lora_dropout is 0.1, and must be 0"),
    "DoRA": ({"use_dora": True, "target_modules": ["q_proj"]}, "use_dora is True, which is not supported"),
    "a bias": ({"bias": "all", "target_modules": ["q_proj"]}, "bias is 'all', which is not supported"),
    "some layers": ({"layers_to_transform": 0, "target_modules": ["q_proj"]}, "layers_to_transform is 0, which is not"),
    "embeddings": ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save is .'lm_head'."),
}


@pytest.mark.parametrize(("settings", "words"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_exact_is_refused_in_one_line(settings, words, tiny_checkpoint):
    with pytest.raises(ConfigurationError, match=words) as refused:
        LocalModelForCausalLM.from_pretrained(
            str(tiny_checkpoint("llama")), tuning_mode="lora", lora=LoraConfig(**settings)
        )
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tuning_mode": "lora"}, "no lora is given"),
        ({"lora": ATTENTION}, "set tuning_mode='lora'"),
        ({"tuning_mode": "lora", "lora": 8}, "give a peft.LoraConfig"),
        ({"tuning_mode": "lora", "lora": {"r": 0, "target_modules": ["q_proj"]}}, "r is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, words, tiny_checkpoint):
    with pytest.raises(ConfigurationError, match=words):
        LocalModelForCausalLM.from_pretrained(str(tiny_checkpoint("llama")), **options)


@pytest.mark.slow
def test_servers_with_petals_methods_alone_are_left_out(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], servers="petals")
    with pytest.raises(IncompatibleServerError, match="offers only Petals' methods, which take no LoRA"):
        remote_causal(swarm, ATTENTION)


@pytest.mark.slow
def test_an_adapter_for_other_blocks_is_refused(tiny_checkpoint, start_swarm):
    model = remote_causal(start_swarm(tiny_checkpoint("llama"), [(0, 4)]), ATTENTION)
    with pytest.raises(UnsupportedInputError, match="an adapter of blocks 0:4 does not fit blocks 1:3"):
        remote_blocks(model)[1:3].run(torch.randn(1, 3, 32), adapter=model.bridge._adapter())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "classifier"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_goes_to_peft_and_comes_back(kind, family, tiny_checkpoint, start_swarm, tmp_path):
    checkpoint, batch = tiny_checkpoint(family), right_padded_batch()
    swarm = start_swarm(checkpoint, UNEVEN)
    options: dict[str, Any] = {"num_labels": 3} if kind == "classifier" else {}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model, _ = remote_and_local(kind, checkpoint, swarm, ALL_LINEAR, **options)
    model.save_pretrained(tmp_path / "ours")
    auto = AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
    peft = PeftModel.from_pretrained(auto.from_pretrained(str(checkpoint), **options), str(tmp_path / "ours")).eval()
    expected, real = model(**inputs).logits, slice(None) if kind == "classifier" else batch["attention_mask"].bool()
    assert relative_error(peft(**inputs).logits[real], expected[real]) < 1e-5
    peft.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("ours", "theirs"):
        loaded = swarm.load(DISTRIBUTED[kind], shared_peer=True, adapter=tmp_path / folder, **options)
        for name, value in trainable_state_dict(model).items():
            assert torch.equal(trainable_state_dict(loaded)[name], value), name
    with pytest.raises(ConfigurationError, match=r"it lacks|has other shapes|no linear module"):
        LocalModelForCausalLM.from_pretrained(str(tiny_checkpoint("bloom")), adapter=tmp_path / "ours")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "deep_ptune"])
def test_audits_and_the_judge_compute_with_the_factors(mode, tiny_checkpoint, start_swarm, caplog):
    """Three servers, one of which lies, forward or backward: found, and the step is PEFT's."""
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch()
    swarm = start_swarm(checkpoint, [(0, 4), (0, 4), (0, 4)])
    options = {"client_config": ClientConfig(audit_rate=1.0, ban_period=60.0)}
    remote = load(lambda **given: swarm.load(AutoDistributedModelForCausalLM, **options, **given), ALL_LINEAR, mode)
    local = load(lambda **given: LocalModelForCausalLM.from_pretrained(str(checkpoint), **given), ALL_LINEAR, mode)
    expected, _ = causal_loss(local, batch)
    expected.backward()
    for is_tampered in (False, True):
        remote.zero_grad()
        loss, _ = causal_loss(remote, batch)
        if is_tampered:
            span: Any = swarm.by_id[peer_with_the_graph(loss)].span
            honest = span.backward
            span.backward = lambda *args, run=honest: {name: 1.5 * grad for name, grad in run(*args).items()}
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert_same_gradients(remote, local, 1e-5)
        assert ("lies" in caplog.text) == is_tampered
    assert remote_blocks(remote).stats.audits >= 4


@pytest.mark.slow
def test_eight_bits_on_the_wire_leave_factors_in_16(tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch()
    swarm = start_swarm(checkpoint, UNEVEN)
    seen = []
    for server in swarm.servers:
        received = server.span.forward
        server.span.forward = lambda inputs, *cached, run=received: seen.append(inputs) or run(inputs, *cached)
    model = remote_causal(swarm, ATTENTION, client_config=ClientConfig(wire_dtype="int8_blockwise"))
    loss, _ = causal_loss(model, batch)
    loss.backward()
    expected_loss, expected = peft_step(checkpoint, ATTENTION, batch)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-2)
    for name, factor in lora_of(model).named_parameters():
        assert relative_error(factor.grad, expected[name].grad) < 0.1, name
    given = {number: own for inputs in seen for own in inputs.adapter.lora for number in own.blocks}
    for number, own in given.items():
        query = lora_of(model).get_submodule(f"{number}.{own.target}")
        a = own.a[own.blocks.index(number)]
        assert 0 < relative_error(a.detach(), query.lora_A.detach()) < 2**-8, "bfloat16"

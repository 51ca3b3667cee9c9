"""A trained prefix through a swarm: plain local Hugging Face with the same keys and values in front, and PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)

from petals_lightning.client import ClientConfig
from petals_lightning.errors import (
    ConfigurationError,
    IncompatibleServerError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from petals_lightning.hf.compat import cache_name, quiet_transformers
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    export_peft,
    prompts_of,
    remote_blocks,
)
from petals_lightning.models.local import LocalModelForCausalLM, LocalModelForSequenceClassification
from tests.helpers.families import (
    CAUSAL_ONLY,
    HIDDEN,
    NUM_BLOCKS,
    RECURRENT_CONFIGS,
    TINY_CONFIGS,
    VOCAB,
    longrope_config,
    save_tiny_checkpoint,
)
from tests.helpers.parity import UNEVEN, P, assert_same_gradients, loss_trace, pair, right_padded_batch
from tests.helpers.requests import (
    assert_a_lost_server_changes_no_gradient,
    micro_batches,
    segment_sizes,
    stops_a_server,
)
from tests.helpers.tampering import assert_a_liar_is_found, chosen, tamper
from tools.testing.tensors import relative_error

CLASSIFIERS = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification
CAUSAL = AutoDistributedModelForCausalLM, LocalModelForCausalLM
pytestmark = [  # what PEFT 0.21 meets in transformers 5.24
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]


def plain(auto: Any, checkpoint: Path | str, **options: Any) -> Any:
    with quiet_transformers():
        return auto.from_pretrained(str(checkpoint), **options).eval().requires_grad_(False)


def with_past(model: Any, prompts: Any, batch: dict[str, torch.Tensor]) -> Any:
    """Plain Hugging Face's output, with the prompts' keys and values in its own cache."""
    size = len(batch["input_ids"])
    pairs = [tuple(tensor.expand(size, -1, -1, -1) for tensor in each) for each in prompts.past_by_block()]
    ones = torch.ones(size, prompts.pre_seq_len, dtype=torch.long)
    mask = torch.cat([ones, batch["attention_mask"]], dim=1)
    return model(**batch | {"attention_mask": mask, cache_name(model): DynamicCache(pairs)})


def assert_prefix_has_the_gradients(model: Any, prompts: Any) -> None:
    for (name, own), (_, expected) in zip(
        prompts_of(model).named_parameters(), prompts.named_parameters(), strict=True
    ):
        assert expected.grad.norm() > 1e-6, f"the test is blind: no gradient reaches {name}"
        assert relative_error(own.grad, expected.grad) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_every_family_equals_hugging_face_with_the_same_keys_and_values(family, tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint(family), right_padded_batch()
    swarm, real = start_swarm(checkpoint, UNEVEN), batch["attention_mask"].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    remote, local = pair(*CAUSAL, checkpoint, swarm, "prefix")
    reference = prompts_of(pair(*CAUSAL, checkpoint, swarm, "prefix")[1])
    expected = with_past(plain(AutoModelForCausalLM, checkpoint), reference, inputs).logits
    weights = torch.randn(expected[real].shape, generator=torch.Generator().manual_seed(0))
    (expected[real] * weights).sum().backward()
    for model in (remote, local):
        logits = model(**inputs).logits
        (logits[real] * weights).sum().backward()
        assert relative_error(logits[real], expected[real]) < 1e-5
        assert_prefix_has_the_gradients(model, reference)
    if family in CAUSAL_ONLY:
        return
    remote, local = pair(*CLASSIFIERS, checkpoint, swarm, "prefix", num_labels=3)
    outputs = [model(**batch) for model in (remote, local)]
    for output in outputs:
        output.loss.backward()
    classifier = plain(AutoModelForSequenceClassification, checkpoint, num_labels=3)
    classifier.score.load_state_dict(local.score.state_dict())
    expected = with_past(classifier, prompts_of(local), batch)
    for output in outputs:
        assert relative_error(output.logits, expected.logits) < 1e-5
        assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert_same_gradients(remote, local, 1e-5)


@pytest.mark.parametrize("family", RECURRENT_CONFIGS)
def test_a_family_that_keeps_something_else_is_refused(family, tiny_checkpoint):
    checkpoint = str(tiny_checkpoint(family))
    options: dict[str, Any] = {"tuning_mode": "prefix", "pre_seq_len": P}
    with pytest.raises(UnsupportedModelError, match=r"has no trained prefix: .*; use tuning_mode='deep_ptune'") as e:
        LocalModelForCausalLM.from_pretrained(checkpoint, **options)
    assert "\n" not in str(e.value)
    with pytest.raises(UnsupportedModelError, match="has no trained prefix"):  # before any server is asked
        AutoDistributedModelForCausalLM.from_pretrained(checkpoint, **options, dht_prefix="x", initial_peers=["x"])


@pytest.mark.slow
def test_twenty_training_steps_give_the_local_losses(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, UNEVEN)
    losses = [
        loss_trace(model, lambda model, batch: model(**batch).loss)
        for model in pair(*CLASSIFIERS, checkpoint, swarm, "prefix", num_labels=3)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.98 * losses[0][1], "the test is blind: nothing was learnt"


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["alone", "beside LoRA"])
@pytest.mark.parametrize("together", [True, False], ids=["handed over", "one by one"])
def test_a_chain_and_micro_batches_equal_the_local_model(together, lora, tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch(batch=8)
    swarm = start_swarm(checkpoint, [(0, 1), (1, 2), (2, 4)])
    options: dict[str, Any] = {"lora": {"r": 2, "target_modules": "all-linear"}} if lora else {}
    config = ClientConfig(max_microbatch_tokens=2 * 9, server_to_server=together)
    remote, local = pair(*CLASSIFIERS, checkpoint, swarm, "prefix", config, num_labels=3, **options)
    for model in (remote, local):
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if name.endswith("lora_B"):
                    parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    loss, expected = (model(**batch).loss for model in (remote, local))
    assert micro_batches(loss) == 4
    assert segment_sizes(loss) == ([3] if together else [1, 1, 1])
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(remote, local, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_lost_server_changes_no_gradient(phase, tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch()
    swarm = start_swarm(checkpoint, [(0, 2), (0, 2), (2, 4), (2, 4)])
    remote, local = pair(*CLASSIFIERS, checkpoint, swarm, "prefix", num_labels=3)
    assert_a_lost_server_changes_no_gradient(phase, swarm, remote, local, lambda model: model(**batch).loss)


@pytest.mark.slow
def test_audits_and_the_judge_apply_it(tiny_checkpoint, start_swarm, caplog):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch()
    swarm = start_swarm(checkpoint, [(0, 4)] * 3)
    config = ClientConfig(audit_rate=1.0, ban_period=60.0)
    remote, local = pair(*CLASSIFIERS, checkpoint, swarm, "prefix", config, num_labels=3, prompt_init="vocabulary")

    def step() -> None:
        remote.zero_grad()
        local.zero_grad()
        loss, expected = remote(**batch).loss, local(**batch).loss
        loss.backward()
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert_same_gradients(remote, local, 1e-5)

    step()
    assert remote_blocks(remote).stats.audits
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    tamper(chosen(remote, swarm), lambda hidden: hidden + 0.5 * torch.randn_like(hidden))
    assert_a_liar_is_found(step, caplog)


def ways_to_generate() -> dict[str, dict[str, Any]]:
    ids = torch.randint(2, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
    one = {"input_ids": ids[:1], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    mask = (torch.arange(7)[None] >= torch.tensor([0, 4, 2])[:, None]).long()
    return {
        "greedy": one,
        "sampling": one | {"do_sample": True, "temperature": 1.3},
        "beams": one | {"num_beams": 3, "num_return_sequences": 2},
        "left-padded": {"input_ids": ids * mask, "attention_mask": mask},
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bloom", "falcon", "mixtral", "qwen3", "gemma3", "gpt_neox", "gpt2"])
def test_a_session_has_the_prefix_in_front(family, tiny_checkpoint, start_swarm):
    """The other side runs the whole sequence again for every token: no cache of samples to go wrong."""
    checkpoint = tiny_checkpoint(family)
    remote, local = pair(*CAUSAL, checkpoint, start_swarm(checkpoint, [(0, 1), (1, 3), (3, 4)]), "prefix")
    bare = plain(AutoModelForCausalLM, checkpoint)
    options = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    for name, way in ways_to_generate().items():
        sequences = []
        for model, cached in ((remote, {}), (local, {"use_cache": False})):
            torch.manual_seed(0)
            sequences.append(model.generate(**options, **way, **cached))
        assert torch.equal(*sequences), name
    assert not torch.equal(remote.generate(**options, **way), bare.generate(**options, **way)), "the test is blind"


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_a_server_lost_in_a_generation_changes_no_token(beams, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("mixtral")
    swarm = start_swarm(checkpoint, [(0, 2), (2, 4), (0, 1), (1, 3), (3, 4)])
    remote, local = pair(*CAUSAL, checkpoint, swarm, "prefix")
    options = ways_to_generate()["left-padded"] | {"max_new_tokens": 10, "pad_token_id": 0, "num_beams": beams}
    options |= {"eos_token_id": None}
    with remote.inference_session(max_length=20) as conversation:
        got = remote.generate(**options, stopping_criteria=stops_a_server(swarm, conversation))
    assert torch.equal(got, local.generate(**options, use_cache=False))
    assert remote_blocks(remote).stats.retries == 1


@pytest.mark.slow
def test_factors_that_depend_on_the_length_count_the_prefix(tmp_path, start_swarm):
    """Keys that are given stay as they are, as in Hugging Face's cache; only tokens are rotated by other factors."""
    checkpoint = save_tiny_checkpoint(longrope_config(switch=12), tmp_path)
    remote, local = pair(*CAUSAL, checkpoint, start_swarm(checkpoint, UNEVEN), "prefix")
    logits = []
    for length in (9, 10):  # with the prefix 12 and 13
        ids = torch.randint(2, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))
        logits.append(local(ids).logits)
        assert relative_error(remote(ids).logits, logits[-1]) < 1e-5
        options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(remote.generate(ids, **options), local.generate(ids, **options, use_cache=False))
    assert relative_error(logits[1][:, :9], logits[0]) > 1e-3, "the test is blind: the factors do not differ"


@pytest.mark.slow
def test_a_conversation_goes_back_to_its_prefix(tiny_checkpoint, start_swarm):
    """Steps after a rewind to position 0 still have the keys and values in front."""
    checkpoint = tiny_checkpoint("llama")
    remote, _ = pair(*CAUSAL, checkpoint, start_swarm(checkpoint, UNEVEN), "prefix")
    hidden, layers = torch.randn(2, 6, HIDDEN), remote_blocks(remote)
    with torch.no_grad():
        adapter = remote.bridge._adapter()
        expected, _ = layers.run(hidden, adapter=adapter)
        with layers.inference_session(max_length=6, adapter=adapter) as session:
            for _ in range(2):
                outputs = [session.step(piece) for piece in hidden.split([3, 1, 2], dim=1)]
                assert relative_error(torch.cat(outputs, dim=1), expected) < 1e-5
                session.position = 0


@pytest.mark.slow
def test_starts_are_those_of_the_local_model(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, 1), (1, 2), (2, 4)])
    flat = {}
    for init in ("random", "vocabulary", "zero"):
        remote, local = pair(*CAUSAL, checkpoint, swarm, "prefix", prompt_init=init)
        flat[init] = prompts_of(local).flat_past()
        assert torch.allclose(prompts_of(remote).flat_past(), flat[init], atol=1e-6), init
    assert flat["zero"].norm() == 0
    assert flat["vocabulary"].norm() > 0
    torch.manual_seed(1)
    theirs = peft.tuners.prefix_tuning.PrefixEncoder(
        peft.PrefixTuningConfig(num_virtual_tokens=P, token_dim=16, num_layers=NUM_BLOCKS, num_attention_heads=2)
    )
    assert torch.equal(theirs.embedding.weight, flat["random"])
    with pytest.raises(ConfigurationError, match="prompt_init=zero is a start of tuning_mode='prefix'"):
        LocalModelForCausalLM.from_pretrained(checkpoint, tuning_mode="ptune", pre_seq_len=P, prompt_init="zero")


@pytest.mark.slow
def test_a_server_lost_at_the_start_changes_nothing(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, 2), (2, 4)])
    remote, _ = pair(*CAUSAL, checkpoint, swarm, "prefix")
    tokens = torch.randn(P, HIDDEN)
    remote.bridge.past_after(tokens)
    expected, lost = prompts_of(remote).flat_past(), remote_blocks(remote).route()[0].peer_id
    spare = start_swarm(checkpoint, [(0, 2)], initial_peers=swarm.initial_peers[:1])
    swarm.by_id[lost].stop(timeout=0)
    remote.bridge.past_after(tokens)
    assert torch.allclose(prompts_of(remote).flat_past(), expected, atol=1e-6)
    assert remote_blocks(remote).route()[0].peer_id in spare.by_id


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bloom", "gemma2"])
def test_a_prefix_goes_to_peft_and_comes_back(family, tiny_checkpoint, tmp_path):
    checkpoint, batch = str(tiny_checkpoint(family)), right_padded_batch()
    real = batch["attention_mask"].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = LocalModelForCausalLM.from_pretrained(checkpoint, tuning_mode="prefix", pre_seq_len=P)
    expected = model(**inputs).logits
    export_peft(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain(AutoModelForCausalLM, checkpoint), str(tmp_path / "ours"))
    assert relative_error(theirs(**inputs).logits[real], expected[real]) < 1e-5
    own = peft.get_peft_model(
        plain(AutoModelForCausalLM, checkpoint), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    own.save_pretrained(str(tmp_path / "theirs"))
    loaded = LocalModelForCausalLM.from_pretrained(checkpoint, prompts=tmp_path / "theirs")
    assert prompts_of(loaded).pre_seq_len == 4
    assert relative_error(loaded(**inputs).logits[real], own(**inputs).logits[real]) < 1e-5


def test_adapters_of_peft_that_are_no_prompts_are_refused(tiny_checkpoint, tmp_path):
    checkpoint = str(tiny_checkpoint("llama"))
    for config, words in (
        (peft.LoraConfig(r=2, target_modules=["q_proj"]), "is PEFT's LORA: .* give adapter= for LoRA"),
        (
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True),
            "PREFIX_TUNING with prefix_projection",
        ),
    ):
        config.save_pretrained(str(tmp_path))
        with pytest.raises(ConfigurationError, match=words):
            LocalModelForCausalLM.from_pretrained(checkpoint, prompts=tmp_path)


def test_a_caller_of_the_local_model_passes_no_cache(tiny_checkpoint):
    model = LocalModelForCausalLM.from_pretrained(str(tiny_checkpoint("llama")), tuning_mode="prefix", pre_seq_len=P)
    with pytest.raises(UnsupportedInputError, match="passes its own cache"):
        model(torch.ones(1, 3, dtype=torch.long), **{cache_name(model): DynamicCache()})


@pytest.mark.slow
def test_servers_with_petals_methods_alone_are_left_out(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], servers="petals")
    with pytest.raises(IncompatibleServerError, match="offers only Petals' methods, which take no trained prefix"):
        swarm.load(AutoDistributedModelForCausalLM, tuning_mode="prefix", pre_seq_len=P)

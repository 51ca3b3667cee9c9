"""Rotary embeddings that change with the length: as local Hugging Face on both sides of the change, or refused."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from petals_lightning.client import ClientConfig
from petals_lightning.errors import RemoteRequestError, UnsupportedInputError
from petals_lightning.models import AutoDistributedModelForCausalLM, prompts_of, remote_blocks
from petals_lightning.models.local import LocalModelForCausalLM
from tests.helpers.families import COMMON, HIDDEN, VOCAB, longrope_config, save_tiny_checkpoint
from tests.helpers.sessions import random_prompts
from tools.testing.tensors import relative_error

pytestmark = pytest.mark.slow

SWITCH, P = 16, 3
SPANS = [(0, 1), (1, 3), (3, 4)]
OPTIONS = {"max_new_tokens": 14, "pad_token_id": 0, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    return save_tiny_checkpoint(longrope_config(SWITCH), tmp_path_factory.mktemp("longrope"))


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    config = tf.LlamaConfig(
        **COMMON | {"max_position_embeddings": SWITCH},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    )
    return save_tiny_checkpoint(config, tmp_path_factory.mktemp("dynamic"))


def local_model(checkpoint, **options):
    return LocalModelForCausalLM.from_pretrained(str(checkpoint), **options)


def token_ids(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded() -> dict[str, torch.Tensor]:
    mask = (torch.arange(12)[None] >= torch.tensor([[0], [4]])).long()
    return {"input_ids": token_ids(12, batch=2) * mask, "attention_mask": mask}


def prompted(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in prompts_of(model).parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_the_switch_matters(phi3):
    """Else the tests below are blind: without it, other tokens come out."""
    local, ids = local_model(phi3), token_ids(10)
    crossing = local.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
    local.config.rope_parameters["original_max_position_embeddings"] = 64
    local.config.original_max_position_embeddings = 64
    assert not torch.equal(local.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS), crossing)


def one_sample(length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": token_ids(length), "attention_mask": torch.ones(1, length, dtype=torch.long)}


@pytest.mark.parametrize(
    "way",
    [
        one_sample(10),
        one_sample(20),
        one_sample(10) | {"num_beams": 3},
        one_sample(10) | {"do_sample": True},
        pytest.param(left_padded(), marks=pytest.mark.ours("the longest sample of a batch decides for all")),
    ],
    ids=["crossing", "beyond", "beams", "sampling", "left-padded"],
)
def test_generation_across_the_switch_gives_the_tokens_of_local_hugging_face(way, phi3, start_swarm):
    sequences = []
    for model in (local_model(phi3), start_swarm(phi3, SPANS).load(AutoDistributedModelForCausalLM)):
        torch.manual_seed(0)
        sequences.append(model.generate(**OPTIONS | way))
    assert torch.equal(*sequences)


@pytest.mark.parametrize("length", [10, 15, 20], ids=["crossing", "at the switch", "beyond"])
def test_assisted_generation_across_the_switch_gives_the_tokens_of_local_assisted_generation(
    length, phi3, tiny_checkpoint, start_swarm
):
    """Not those of greedy: guesses on both sides of the switch are checked in one pass, there as here."""
    local, remote = local_model(phi3), start_swarm(phi3, SPANS).load(AutoDistributedModelForCausalLM)
    for assistant in (local_model(tiny_checkpoint("llama")), local_model(phi3)):  # guesses badly, guesses well
        options = OPTIONS | one_sample(length) | {"assistant_model": assistant}
        assert torch.equal(remote.generate(**options), local.generate(**options))


def test_servers_with_petals_methods_alone_refuse_padding_across_the_switch(phi3, start_swarm):
    remote = start_swarm(phi3, SPANS, servers="petals").load(AutoDistributedModelForCausalLM)
    with pytest.raises(UnsupportedInputError, match="uses other rotary factors for all samples of a batch"):
        remote.generate(**OPTIONS | left_padded())


def test_prompts_count_and_conversations_cross_back(phi3, start_swarm):
    """The other side has no cache to go wrong: it runs the whole sequence anew for every token."""
    options = {"tuning_mode": "deep_ptune", "pre_seq_len": P}
    swarm = start_swarm(phi3, SPANS)
    local, remote = (
        prompted(local_model(phi3, **options)),
        prompted(swarm.load(AutoDistributedModelForCausalLM, **options)),
    )

    def expected(ids: torch.Tensor) -> torch.Tensor:
        return local.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **OPTIONS)

    first, second = token_ids(6), token_ids(4, seed=1)
    with remote.inference_session(max_length=60) as session:
        assert torch.equal(remote.generate(first, **OPTIONS), expected(first))
        assert torch.equal(
            remote.generate(second, **OPTIONS), expected(torch.cat([expected(first), second], 1))[:, 20:]
        )
        session.position = 5
        assert torch.equal(remote.generate(second, **OPTIONS), expected(torch.cat([first[:, :5], second], 1))[:, 5:])
    assert remote_blocks(remote).stats.retries == 0


def test_training_beyond_the_switch_gives_local_gradients(phi3, start_swarm):
    options = {"tuning_mode": "deep_ptune", "pre_seq_len": P}
    swarm = start_swarm(phi3, [(0, 2), (2, 4)])
    for length in (SWITCH - P, SWITCH - P + 1, 25):
        ids, grads = token_ids(length, batch=3), []
        for model in (local_model(phi3, **options), swarm.load(AutoDistributedModelForCausalLM, **options)):
            loss = prompted(model)(input_ids=ids, labels=ids).loss
            loss.backward()
            grads.append(prompts_of(model).deep.grad)
        assert relative_error(grads[1], grads[0]) < 1e-4, length


def test_sessions_of_layers_survive_losses_and_small_pieces_on_both_sides(phi3, start_swarm):
    """Replayed and cut into pieces, keys are still those of the whole length."""
    swarm = start_swarm(phi3, [(0, 2), (2, 4), (0, 4)])
    small_pieces = ClientConfig(max_microbatch_tokens=16)
    layers = remote_blocks(swarm.load(AutoDistributedModelForCausalLM, client_config=small_pieces))
    hidden, prompts = torch.randn(2, 30, HIDDEN), random_prompts(4)
    for end in (SWITCH - P, SWITCH - P + 1, 18):
        expected, _ = layers.run(hidden[:, :end], **prompts)
        with layers.inference_session(max_length=30, **prompts) as session:
            outputs = [session.step(piece) for piece in hidden[:, :end].split(5, dim=1)]
            assert relative_error(outputs[-1], expected[:, -outputs[-1].shape[1] :]) < 1e-4, end
    with layers.inference_session(max_length=30, **prompts) as session:
        session.step(hidden[:, :18])
        lost = swarm.by_id[session.peers[0]]
        lost.stop(timeout=0.1)
        swarm.servers.remove(lost)
        assert relative_error(session.step(hidden[:, 18:19]), layers.run(hidden[:, :19], **prompts)[0][:, -1:]) < 1e-4
    assert layers.stats.retries >= 1


def test_what_no_server_can_follow_is_refused(dynamic, start_swarm):
    local, remote = local_model(dynamic), start_swarm(dynamic, SPANS).load(AutoDistributedModelForCausalLM)
    ids = token_ids(10)
    options = OPTIONS | {"attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        remote.generate(ids, **options | {"max_new_tokens": 6}), local.generate(ids, **options | {"max_new_tokens": 6})
    )
    with pytest.raises(RemoteRequestError, match=r"17 positions .* rope_type 'dynamic' .* keep to 16"):
        remote.generate(ids, **options)
    with pytest.raises(RemoteRequestError, match="20 positions"):
        remote(token_ids(20))


def test_a_client_that_does_not_know_of_the_switch_is_refused(phi3, start_swarm):
    layers = remote_blocks(start_swarm(phi3, SPANS).load(AutoDistributedModelForCausalLM))
    layers._swarm.rotary_switch = None
    with layers.inference_session(max_length=30) as session:
        session.step(torch.randn(1, SWITCH, HIDDEN))
        with pytest.raises(RemoteRequestError, match="must start again from position 0"):
            session.step(torch.randn(1, 1, HIDDEN))

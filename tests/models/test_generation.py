"""`generate` through a real 3-server swarm gives the tokens of plain local Hugging Face."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from petals_lightning.errors import UnsupportedInputError
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.models import AutoDistributedModelForCausalLM, prompts_of, remote_blocks
from petals_lightning.models.local import LocalModelForCausalLM
from tests.helpers.families import TINY_CONFIGS, VOCAB, save_tiny_checkpoint
from tests.helpers.parity import P
from tests.helpers.requests import stops_a_server
from tests.helpers.sessions import GENERATING, assert_steps_equal_one_forward

THREE = [(0, 1), (1, 3), (3, 4)]
GEMMA3 = pytest.param("gemma3", marks=pytest.mark.ours("padding behind real tokens counts in a sliding window"))


def local_model(checkpoint) -> torch.nn.Module:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(str(checkpoint)).eval()


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded() -> dict[str, torch.Tensor]:
    ids, lengths = token_ids(3, 7), torch.tensor([7, 3, 5])
    mask = (torch.arange(7)[None] >= 7 - lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def assistant(tmp_path_factory):
    """A small model of the same vocabulary, that guesses wrong as well as right."""
    folder = save_tiny_checkpoint(TINY_CONFIGS["llama"](), tmp_path_factory.mktemp("assistant"), seed=1)
    return local_model(folder)


def ways_to_generate(assistant) -> dict[str, dict]:
    ones = {"attention_mask": torch.ones(1, 6, dtype=torch.long)}
    one = {"input_ids": token_ids(1, 6), **ones}
    return {
        "greedy": one,
        "sampling": one | {"do_sample": True, "temperature": 1.3, "top_k": 20, "num_return_sequences": 2},
        "beams": one | {"num_beams": 3, "num_return_sequences": 2},
        "left-padded": left_padded(),
        "left-padded beams": left_padded() | {"num_beams": 2, "eos_token_id": list(range(5))},
        "assisted": one | {"assistant_model": assistant},
        "with eos": one | {"eos_token_id": list(range(0, VOCAB, 4)), "repetition_penalty": 1.2},
    }


@pytest.mark.also_on("petals", "mixed", "split", family=("llama", "bloom"))
@pytest.mark.parametrize("family", sorted(GENERATING))
def test_tokens_and_steps_equal_local_hugging_face(family, tiny_checkpoint, start_swarm, servers, assistant):
    checkpoint = tiny_checkpoint(family)
    local: Any = local_model(checkpoint)
    remote = start_swarm(checkpoint, THREE).load(AutoDistributedModelForCausalLM)
    for name, options in ways_to_generate(assistant).items():
        sequences = []
        for model in (local, remote):
            torch.manual_seed(0)
            sequences.append(model.generate(**options, max_new_tokens=8, pad_token_id=0))
        assert torch.equal(*sequences), name
        assert len(sequences[0].unique()) > 3, "the test is blind: the model repeats itself"
    assert remote_blocks(remote).stats.retries == 0
    assert (remote_blocks(remote).stats.handovers > 0) == (servers in ("ours", "split"))
    assert_steps_equal_one_forward(remote_blocks(remote))


@pytest.mark.slow
@pytest.mark.also_on("petals", "mixed", family=("bloom", "qwen3"))
@pytest.mark.parametrize("family", ["llama", "bloom", "falcon", "mixtral", "qwen3", GEMMA3, "gpt_neox", "gpt2"])
def test_prompts_act_as_in_training(family, tiny_checkpoint, start_swarm, assistant):
    """The other side runs the whole sequence anew for every token, with the prompts in front: no cache to go wrong."""
    checkpoint = tiny_checkpoint(family)
    swarm = start_swarm(checkpoint, THREE)
    one = {"input_ids": token_ids(1, 5), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    for mode in ("ptune", "deep_ptune"):
        remote, local = prompted_pair(checkpoint, swarm, {"tuning_mode": mode, "pre_seq_len": P})
        sampling = {"do_sample": True, "temperature": 1.3}
        for way in (one, left_padded(), one | {"num_beams": 2}, one | sampling):
            options, sequences = way | {"max_new_tokens": 8, "pad_token_id": 0}, []
            for model, cached in ((remote, {}), (local, {"use_cache": False})):
                torch.manual_seed(0)
                sequences.append(model.generate(**options, **cached))
            assert torch.equal(*sequences), mode
        options = one | {"max_new_tokens": 8, "pad_token_id": 0}
        greedy = local.generate(**options, use_cache=False)
        assert torch.equal(remote.generate(**options, assistant_model=assistant), greedy), "no cache, no assistant"


@pytest.mark.parametrize("family", ["falcon", "mixtral", GEMMA3])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_server_lost_in_a_generation_with_prompts_changes_no_token(beams, family, tiny_checkpoint, start_swarm):
    """A batch with padding and prompts; what takes the server's place is cut elsewhere."""
    checkpoint = tiny_checkpoint(family)
    swarm = start_swarm(checkpoint, [(0, 2), (2, 4), (0, 1), (1, 3), (3, 4)])
    remote, local = prompted_pair(checkpoint, swarm, {"tuning_mode": "deep_ptune", "pre_seq_len": P})
    options = left_padded() | {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None, "num_beams": beams}
    with remote.inference_session(max_length=20) as conversation:
        got = remote.generate(**options, stopping_criteria=stops_a_server(swarm, conversation))
    assert torch.equal(got, local.generate(**options, use_cache=False))
    assert remote_blocks(remote).stats.retries == 1


def prompted_pair(checkpoint, swarm, options: dict) -> list:
    models = []
    for load in (
        lambda: swarm.load(AutoDistributedModelForCausalLM, **options),
        lambda: LocalModelForCausalLM.from_pretrained(str(checkpoint), **options),
    ):
        torch.manual_seed(1)
        models.append(load())
        with torch.no_grad():
            for parameter in prompts_of(models[-1]).parameters():
                parameter.normal_(0, 0.3)
    return models


@pytest.fixture
def llama(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, 2), (2, 4)])
    return swarm.load(AutoDistributedModelForCausalLM), local_model(checkpoint), swarm


@pytest.mark.slow
def test_a_conversation_goes_on_without_sending_the_past_again(llama, servers):
    """20 turns: every token's activations leave here once, for the first server, plus headers and routes."""
    remote, local, _ = llama
    stats, conversation, turns = remote_blocks(remote).stats, torch.empty(1, 0, dtype=torch.long), 20
    local.config.max_position_embeddings = 256
    options = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False, "eos_token_id": None}
    with remote.inference_session(max_length=20 * 7) as session:
        remote.generate(token_ids(1, 1), **options)
        session.position = 0
        before, requests = stats.bytes_sent, turns * 4
        for turn in range(turns):
            new = token_ids(1, 3, seed=turn)
            answer = remote.generate(new, **options)
            conversation = torch.cat([conversation, new], dim=1)
            expected = local.generate(conversation, attention_mask=torch.ones_like(conversation), **options)
            assert torch.equal(answer, expected[:, conversation.shape[1] - 3 :])
            conversation = expected
        tokens = session.position
        assert tokens == turns * 7 - 1
        assert torch.equal(session.tokens, conversation)
    activations = tokens * 32 * 4  # hidden size 32, float32
    headers = 640 if servers == "ours" else 700  # Petals' requests name every block
    assert activations < stats.bytes_sent - before < activations + headers * requests


def conversation_turn(local, remote, tokens, mask, new, new_mask, options) -> tuple[torch.Tensor, torch.Tensor]:
    """The same turn inside the session and by local Hugging Face, which reads all of it anew."""
    given, given_mask = torch.cat([tokens, new], dim=1), torch.cat([mask, new_mask], dim=1)
    sequences = []
    for model, inputs, seen in ((local, given, given_mask), (remote, new, new_mask)):
        torch.manual_seed(0)
        sequences.append(model.generate(inputs, attention_mask=seen, **options))
    expected, got = sequences
    assert torch.equal(got, expected[:, tokens.shape[1] :])
    rows = len(expected) // len(given)
    said = expected[:, given.shape[1] :]
    ended = torch.isin(said, torch.tensor(EOS)).cumsum(1) - torch.isin(said, torch.tensor(EOS)).long()
    return expected, torch.cat([given_mask.repeat_interleave(rows, 0), (ended == 0).long()], dim=1)


EOS = list(range(0, VOCAB, 6))


@pytest.mark.slow
@pytest.mark.also_on("petals", "mixed")
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", GEMMA3])
def test_batches_and_beams_go_on_in_a_session(family, tiny_checkpoint, start_swarm):
    """Samples of a batch end their turns at different times; beams and return sequences widen and narrow it."""
    checkpoint = tiny_checkpoint(family)
    remote = start_swarm(checkpoint, THREE).load(AutoDistributedModelForCausalLM)
    local, start = local_model(checkpoint), left_padded()
    options = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": EOS}
    empty = torch.empty(3, 0, dtype=torch.long)
    ways = [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 2}]
    with remote.inference_session(max_length=64) as session:
        tokens, mask, padding = empty, empty, 0
        for turn, way in enumerate(ways):
            count = len(tokens)
            new, new_mask = (start["input_ids"], start["attention_mask"]) if not turn else (
                token_ids(count, 3, seed=turn), torch.ones(count, 3, dtype=torch.long)
            )  # fmt: skip
            tokens, mask = conversation_turn(local, remote, tokens, mask, new, new_mask, options | way)
            assert torch.equal(session.tokens, tokens)
            assert torch.equal(session.attention_mask, mask)
            padding += int((mask[:, -5:] == 0).sum())
        assert padding, "the test is blind: all samples ended together"
        assert len(tokens) == 6
        session.select([4, 1])
        tokens, mask = tokens[[4, 1]], mask[[4, 1]]
        two = token_ids(2, 2, seed=9), torch.ones(2, 2, dtype=torch.long)
        conversation_turn(local, remote, tokens, mask, *two, options | {"num_beams": 3, "num_return_sequences": 3})
    assert remote_blocks(remote).stats.retries == 0


@pytest.mark.slow
def test_a_failed_turn_leaves_a_batch_as_it_was(llama):
    remote, local, _ = llama
    options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    ones = torch.ones(2, 4, dtype=torch.long)

    def stop(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("no more")

    with remote.inference_session(max_length=40) as session:
        before = remote.generate(token_ids(2, 4), attention_mask=ones, **options)
        for way in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
            with pytest.raises(RuntimeError, match="no more"):
                remote.generate(token_ids(2, 4), stopping_criteria=StoppingCriteriaList([stop]), **options | way)
            assert torch.equal(session.tokens, before)
        mask = torch.ones_like(before)
        conversation_turn(local, remote, before, mask, token_ids(2, 4, seed=3), ones, options)


@pytest.mark.slow
@pytest.mark.also_on("petals", "mixed")
def test_a_conversation_can_go_back(llama):
    remote, _, _ = llama
    first, second, third = (token_ids(1, 4, seed=seed) for seed in range(3))
    with remote.inference_session(max_length=40) as session:
        remote.generate(first, max_new_tokens=3, pad_token_id=0)
        length = session.tokens.shape[1]
        expected = remote.generate(second, max_new_tokens=5, pad_token_id=0)
        session.position = length
        remote.generate(third, max_new_tokens=5, pad_token_id=0)
        session.position = length
        assert torch.equal(remote.generate(second, max_new_tokens=5, pad_token_id=0), expected)
        session.position = length + 5
        assert torch.equal(remote.generate(max_new_tokens=4, pad_token_id=0), expected[:, 5:])


@pytest.mark.slow
def test_streamers_and_stopping_criteria_work(llama):
    remote, local, _ = llama

    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer, ids = Collect(), token_ids(1, 5)
    stop = StoppingCriteriaList([lambda input_ids, scores, **kwargs: torch.tensor([input_ids.shape[1] >= 9])])
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "max_new_tokens": 20}
    out = remote.generate(ids, streamer=streamer, stopping_criteria=stop, **options)
    assert out.shape[1] == 9
    assert streamer.tokens == [*out[0].tolist(), -1]
    assert torch.equal(out, local.generate(ids, **options)[:, :9])


def test_the_models_generation_config_is_used(tiny_checkpoint, start_swarm, tmp_path):
    folder = save_tiny_checkpoint(TINY_CONFIGS["llama"](), tmp_path)
    GenerationConfig(max_new_tokens=3, do_sample=True, top_k=7, pad_token_id=0).save_pretrained(folder)
    remote = start_swarm(folder, [(0, 4)]).load(AutoDistributedModelForCausalLM)
    assert remote.generation_config.top_k == 7
    assert remote.generate(token_ids(1, 2)).shape == (1, 5)


@pytest.mark.slow
def test_what_a_session_cannot_do_is_refused(llama):
    remote, _, _ = llama
    ids = token_ids(2, 4)
    with remote.inference_session(max_length=30) as session:
        with pytest.raises(UnsupportedInputError, match="needs input_ids"):
            remote.generate(max_new_tokens=2)
        with pytest.raises(UnsupportedInputError, match="inside another"), remote.inference_session(max_length=3):
            pass
        remote.generate(ids, max_new_tokens=2, pad_token_id=0)
        with pytest.raises(UnsupportedInputError, match="has 2 samples, new inputs have 1"):
            remote.generate(ids[:1], max_new_tokens=2)
        with pytest.raises(UnsupportedInputError, match=r"samples \[2\]: this session has 2"):
            session.select([2])
    with (
        remote.inference_session(max_length=5),
        pytest.raises(UnsupportedInputError, match="exceed the session's max_length=5"),
    ):
        remote.generate(ids, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
    assert remote.generate(ids, max_new_tokens=2, pad_token_id=0).shape[0] == 2

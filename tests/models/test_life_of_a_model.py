"""A distributed model from loading to its end: closed, deleted, copied, forked, pickled, used by several threads."""

from __future__ import annotations

import contextvars
import copy
import gc
import multiprocessing
import pickle
import threading
import time

import psutil
import pytest
import torch
import transformers as tf

from petals_lightning.errors import NoServersError, PetalsLightningError, SwarmConnectionError, UnsupportedInputError
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    prompts_of,
)
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.swarm import SwarmNode
from tests.helpers.families import HIDDEN, VOCAB
from tests.helpers.parity import right_padded_batch
from tools.testing.swarms import PREFIX
from tools.testing.tensors import relative_error

pytestmark = pytest.mark.slow

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
IDS = torch.randint(1, VOCAB, (1, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def swarm(tiny_checkpoint, start_swarm):
    return start_swarm(tiny_checkpoint("llama"), [(0, 2), (2, 4)])


@pytest.fixture
def plain(tiny_checkpoint):
    return tf.AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own modules
def test_a_compiled_model_gives_what_it_gives_uncompiled(swarm, tiny_checkpoint):
    options = {"tuning_mode": "deep_ptune", "pre_seq_len": 2, "num_labels": 3}
    torch.manual_seed(0)
    model = swarm.load(AutoDistributedModelForSequenceClassification, **options)
    batch = right_padded_batch()
    losses, grads = [], []
    for one in (model, torch.compile(model)):
        model.zero_grad()
        losses.append(one(**batch).loss)
        losses[-1].backward()
        grads.append(prompts_of(model).deep.grad.clone())
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    assert relative_error(grads[1], grads[0]) < 1e-5
    layers, hidden = torch.compile(model.model.layers), torch.randn(2, 3, HIDDEN)
    assert relative_error(layers(hidden), model.model.layers(hidden)) < 1e-6


def load(swarm, tiny_checkpoint, **options):
    """A model with a peer of its own, as users load it."""
    return AutoDistributedModelForCausalLM.from_pretrained(
        str(tiny_checkpoint("llama")), initial_peers=swarm.initial_peers, dht_prefix=PREFIX, **options
    )


def children():
    return {child.pid for child in psutil.Process().children(recursive=True)}


def wait_for(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_with_statement_closes_a_model(swarm, tiny_checkpoint, plain):
    before = children()
    with load(swarm, tiny_checkpoint) as model:
        assert torch.equal(model.generate(IDS, **GREEDY), plain.generate(IDS, **GREEDY))
        assert children() > before
    assert children() == before
    for use in (lambda: model(input_ids=IDS), lambda: model.generate(IDS, **GREEDY)):
        with pytest.raises(SwarmConnectionError, match=r"is closed: load it again by from_pretrained"):
            use()
    model.close()  # a second time does nothing


def test_a_deleted_model_leaves_nothing(swarm, tiny_checkpoint):
    options = {"tuning_mode": "deep_ptune", "pre_seq_len": 2}
    with load(swarm, tiny_checkpoint, **options) as model:  # servers meet, and open a stream between them
        model(input_ids=IDS, labels=IDS).loss.backward()
    processes, files = children(), psutil.Process().num_fds()
    streams = [len(server.streams) for server in swarm.servers]
    model = load(swarm, tiny_checkpoint, **options)
    loss = model(input_ids=IDS, labels=IDS).loss
    prompts = prompts_of(model)
    del model
    gc.collect()
    loss.backward()  # what is still to come needs the connection
    assert prompts.deep.grad.norm() > 0
    del loss
    gc.collect()
    assert wait_for(lambda: children() == processes)
    assert wait_for(lambda: psutil.Process().num_fds() <= files)
    assert wait_for(lambda: [len(server.streams) for server in swarm.servers] == streams)


def test_a_node_outlives_any_number_of_models(swarm, tiny_checkpoint):
    """A server grants a client 8 streams: models that were dropped must not hold theirs."""
    with SwarmNode(swarm.initial_peers, host_maddrs=(), client_mode=True).start() as node:
        for _ in range(10):
            model = AutoDistributedModelForCausalLM.from_pretrained(
                str(tiny_checkpoint("llama")), node=node, dht_prefix=PREFIX
            )
            assert model(input_ids=IDS).logits.isfinite().all()
        del model


def test_threads_have_conversations_of_their_own(swarm, plain):
    model = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True)
    classifier = swarm.load(AutoDistributedModelForSequenceClassification, shared_peer=True, num_labels=3)
    batch = right_padded_batch()
    scores = classifier(**batch).logits
    inputs = [torch.randint(1, VOCAB, (1, length)) for length in (3, 9, 5, 7)]
    more = torch.randint(1, VOCAB, (1, 2))
    found: dict = {}

    def talk(number):
        try:
            if number % 2:
                found[number] = model.generate(inputs[number], **GREEDY)
                return
            with model.inference_session(max_length=40):
                first = model.generate(inputs[number], **GREEDY)
                found[number] = torch.cat([first, model.generate(more, **GREEDY)], dim=1)
        except PetalsLightningError as error:
            found[number] = error

    def classify():
        found["scores"] = [classifier(**batch).logits for _ in range(4)]

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
    threads.append(threading.Thread(target=classify))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, given in enumerate(inputs):
        expected = plain.generate(given, **GREEDY)
        if number % 2 == 0:
            expected = plain.generate(torch.cat([expected, more], dim=1), **GREEDY)
        assert torch.equal(found[number], expected), found[number]
    assert all(relative_error(got, scores) < 1e-5 for got in found["scores"])


def test_a_thread_goes_on_with_a_conversation_that_it_is_given(swarm, plain):
    model, found = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True), []
    with model.inference_session(max_length=40):
        model.generate(IDS, **GREEDY)
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=[lambda: found.append(model.generate(IDS, **GREEDY))])
        thread.start()
        thread.join()
    whole = plain.generate(torch.cat([plain.generate(IDS, **GREEDY), IDS], dim=1), **GREEDY)
    assert torch.equal(found[0], whole[:, -found[0].shape[1] :])


def test_a_copy_shares_the_connection_and_not_the_weights(swarm, plain):
    model = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True, tuning_mode="deep_ptune", pre_seq_len=2)
    copied = copy.deepcopy(model)
    before = model(input_ids=IDS).logits
    with torch.no_grad():
        prompts_of(copied).input.add_(1.0)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert relative_error(copied(input_ids=IDS).logits, before) > 1e-3
    with torch.no_grad():
        prompts_of(model).input.add_(1.0)
    assert relative_error(copied(input_ids=IDS).logits, model(input_ids=IDS).logits) < 1e-5
    assert torch.equal(copied.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    assert copied.model.layers._swarm is model.model.layers._swarm


def test_averaging_a_model_copies_it(swarm):
    model = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True, tuning_mode="ptune", pre_seq_len=2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    start = prompts_of(model).input.detach().clone()
    averaged.update_parameters(model)
    with torch.no_grad():
        prompts_of(model).input.add_(1.0)
    averaged.update_parameters(model)
    assert torch.allclose(prompts_of(averaged).input, start + 0.5)
    assert averaged(input_ids=IDS).logits.isfinite().all()


def in_child(model, answers):
    try:
        answers.put(str(model(input_ids=IDS).logits.shape))
    except SwarmConnectionError as error:
        answers.put(str(error))


def test_a_forked_child_is_told_at_once(swarm):
    model = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True)
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    child = fork.Process(target=in_child, args=(model, answers))
    child.start()
    assert "was forked from the one that joined the swarm" in answers.get(timeout=30)
    child.join()
    assert model(input_ids=IDS).logits.isfinite().all()


def test_pickling_is_refused_in_one_line(swarm):
    model = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True)
    for what in (model, model.model.layers):
        with pytest.raises(UnsupportedInputError, match=r"cannot be pickled: .* Save what was trained") as refused:
            pickle.dumps(what)
        assert "\n" not in str(refused.value)


def test_embeddings_may_grow(swarm, plain):
    model = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True)
    ids = torch.tensor([[4, VOCAB + 1, 7]])
    for each in (model, plain):
        each.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    with torch.no_grad():
        plain.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
        plain.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight)
    assert relative_error(model(input_ids=ids).logits, plain(input_ids=ids).logits) < 1e-5


def test_more_models_than_a_server_lets_in_are_told_so(tiny_checkpoint, start_swarm):
    """Those that are alive: of the ones dropped nothing is left."""
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], limits=ServerLimits(max_streams_per_client=2))
    for _ in range(4):
        swarm.load(AutoDistributedModelForCausalLM, shared_peer=True)
        gc.collect()
    kept = [swarm.load(AutoDistributedModelForCausalLM, shared_peer=True) for _ in range(2)]
    with pytest.raises(NoServersError, match=r"lists them: .*2 streams open, which is the limit: close models"):
        swarm.load(AutoDistributedModelForCausalLM, shared_peer=True, recovery_timeout=1)
    kept[0].close()
    assert swarm.load(AutoDistributedModelForCausalLM, shared_peer=True)(input_ids=IDS).logits.isfinite().all()

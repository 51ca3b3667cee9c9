"""The suites of parity, generation and failures on servers that offer only Petals' methods, and beside ours.

Here is a part of them, unchanged; `pytest --servers=petals` and `--servers=mixed` run them whole (docs/petals.md).
"""

from __future__ import annotations

import pytest

from tests.client import test_inference_session as sessions
from tests.client import test_server_failures as failures
from tests.helpers.families import RECURRENT_CONFIGS, TINY_CONFIGS
from tests.models import test_generation as generation
from tests.models import test_generation_failures as conversations
from tests.models import test_parity as parity


@pytest.fixture(scope="module", params=["petals", "mixed"])
def servers(request):
    return request.param


assistant, llama = generation.assistant, generation.llama

test_losses = parity.test_twenty_training_steps_give_the_local_losses
test_bfloat16 = parity.test_bfloat16_stays_within_its_rounding
test_slices = parity.test_a_slice_of_remote_blocks_has_the_gradients_of_those_blocks
test_batches_and_beams = generation.test_batches_and_beams_go_on_in_a_session
test_going_back_in_a_conversation = generation.test_a_conversation_can_go_back
test_going_back_and_reordering = sessions.test_going_back_reordering_and_keeping_few_outputs
test_lost_servers_change_no_token = conversations.test_lost_servers_change_no_token


@pytest.mark.parametrize(
    ("servers", "family"),
    [
        *(("petals", family) for family in (*TINY_CONFIGS, *RECURRENT_CONFIGS)),
        *(("mixed", family) for family in ("llama", "bloom", "falcon", "mixtral", "gpt2")),
    ],
    indirect=["servers"],
)
def test_parity(family, servers, tiny_checkpoint, start_swarm):
    parity.test_every_family_equals_local_hugging_face(family, tiny_checkpoint, start_swarm)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_tokens_and_steps(family, tiny_checkpoint, start_swarm, servers, assistant):
    generation.test_tokens_and_steps_equal_local_hugging_face(family, tiny_checkpoint, start_swarm, servers, assistant)


@pytest.mark.parametrize("family", ["bloom", "qwen3"])
def test_prompts_in_generation(family, tiny_checkpoint, start_swarm, assistant):
    generation.test_prompts_act_as_in_training(family, tiny_checkpoint, start_swarm, assistant)


@pytest.mark.parametrize(("phase", "layout"), [("between", "same span"), ("backward", "cut elsewhere")])
def test_a_killed_server(phase, layout, heavier_checkpoint, start_servers):
    failures.test_a_killed_server_changes_no_loss_and_no_gradient(
        phase, failures.LAYOUTS[layout], heavier_checkpoint, start_servers
    )

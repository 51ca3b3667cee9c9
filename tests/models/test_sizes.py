"""What does not fit the model's tables is refused in one line, and never read at another place."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from petals_lightning.errors import UnsupportedInputError
from petals_lightning.models import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from petals_lightning.models.local import LocalModelForSequenceClassification
from tests.helpers.families import TINY_CONFIGS, VOCAB
from tests.helpers.parity import right_padded_batch
from tools.testing.tensors import relative_error

P = 3
TABLES = {"gpt2": 64, "opt": 64, "gptj": 64}


@pytest.mark.slow
@pytest.mark.parametrize("family", TABLES)
def test_positions_beyond_a_table_are_refused(family, tiny_checkpoint, start_swarm):
    positions = TINY_CONFIGS[family]().max_position_embeddings
    swarm = start_swarm(tiny_checkpoint(family), [(0, 4)])
    model = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True, tuning_mode="ptune", pre_seq_len=P)
    ids = torch.randint(1, VOCAB, (1, positions - P))
    assert model(input_ids=ids).logits.shape == (1, positions - P, VOCAB)
    words = f"{P} virtual tokens and {positions - P + 1} tokens: this model has {positions} positions"
    with pytest.raises(UnsupportedInputError, match=words):
        model(input_ids=torch.cat([ids, ids[:, :1]], dim=1))
    with model.inference_session(max_length=positions) as session, torch.no_grad():
        model.generate(ids[:, :-1], max_new_tokens=1, pad_token_id=0)
        with pytest.raises(UnsupportedInputError, match=f"this model has {positions} positions"):
            model.generate(ids[:, :2], max_new_tokens=2, pad_token_id=0)
        assert session.position <= positions


@pytest.mark.slow
def test_rotary_families_count_on(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)])
    model = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True)
    length = model.config.max_position_embeddings + 2
    plain = tf.AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    ids = torch.randint(1, VOCAB, (1, length))
    assert relative_error(model(input_ids=ids).logits, plain(input_ids=ids).logits) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("token", [VOCAB, VOCAB + 7, -1])
def test_tokens_without_an_embedding_are_refused(token, tiny_checkpoint, start_swarm):
    model = start_swarm(tiny_checkpoint("llama"), [(0, 4)]).load(AutoDistributedModelForCausalLM, shared_peer=True)
    with pytest.raises(UnsupportedInputError, match=f"the token {token}, the model has embeddings for 0…{VOCAB - 1}"):
        model(input_ids=torch.tensor([[1, 2, token]]))


@pytest.mark.slow
def test_a_batch_padded_with_another_token_is_refused(tiny_checkpoint, start_swarm):
    """Hugging Face classifies at the last token that is not `pad_token_id`: here, at padding that the mask hides."""
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch()
    swarm = start_swarm(checkpoint, [(0, 4)])
    model = swarm.load(AutoDistributedModelForSequenceClassification, shared_peer=True, num_labels=3, pad_token_id=0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    other = ids.masked_fill(mask == 0, 5)
    with pytest.raises(UnsupportedInputError, match=r"would be classified at a position that is masked out.*is 0"):
        model(input_ids=other, attention_mask=mask)
    with pytest.raises(UnsupportedInputError, match="masked out"):
        model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    torch.manual_seed(1)
    local = LocalModelForSequenceClassification.from_pretrained(str(checkpoint), num_labels=3, pad_token_id=0)
    local.score.load_state_dict(model.score.state_dict())
    assert relative_error(model(**batch).logits, local(**batch).logits) < 1e-5

"""Modules after the blocks run only on positions that are read, whatever their names in the family."""

from __future__ import annotations

import pytest
import torch

from petals_lightning.client.positions import gather_positions, scatter_positions
from petals_lightning.hf.pruning import find_blocks, norms_of
from petals_lightning.models import AutoDistributedModelForSequenceClassification
from petals_lightning.models.local import LocalModelForCausalLM
from tests.helpers.families import HIDDEN, TINY_CONFIGS
from tests.helpers.parity import UNEVEN, right_padded_batch


def test_positions_and_their_gradients_are_gathered_and_scattered():
    batch = torch.randn(3, 4, 5, requires_grad=True)
    rows = torch.tensor([7, 0, 11], dtype=torch.int32)
    taken = gather_positions(batch, rows)
    assert torch.equal(taken[0], torch.stack([batch[1, 3], batch[0, 0], batch[2, 3]]))
    whole = scatter_positions(taken * 2, rows, 3, 4)
    assert whole.shape == (3, 4, 5)
    assert torch.equal(gather_positions(whole, rows), taken * 2)
    assert whole.count_nonzero() == 3 * 5
    whole.sum().backward()
    assert batch.grad is not None
    assert torch.equal(batch.grad, torch.zeros(12, 5).index_fill(0, rows.long(), 2).view(3, 4, 5))


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_the_norm_after_the_blocks_is_found(family, tiny_checkpoint):
    model = LocalModelForCausalLM.from_pretrained(str(tiny_checkpoint(family)))
    owner = find_blocks(model).owner(model)
    norms, ran = norms_of(owner, HIDDEN), []
    for norm in norms:
        norm.register_forward_hook(lambda module, args, output: ran.append(output))
    last = owner(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state
    assert torch.equal(ran[-1], last)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_it_normalises_and_classifies_nothing_else(family, tiny_checkpoint, start_swarm, monkeypatch):
    swarm = start_swarm(tiny_checkpoint(family), UNEVEN)
    seen: dict[str, tuple[int, ...]] = {}
    local = LocalModelForCausalLM.from_pretrained(str(tiny_checkpoint(family)))
    norm_class = type(norms_of(find_blocks(local).owner(local), HIDDEN)[-1])
    forward = norm_class.forward

    def noted(self, hidden):
        seen["norm"] = tuple(hidden.shape)
        return forward(self, hidden)

    monkeypatch.setattr(norm_class, "forward", noted)
    model = swarm.load(AutoDistributedModelForSequenceClassification, shared_peer=True, num_labels=3)
    model.score.register_forward_hook(lambda module, args, output: seen.update(score=tuple(args[0].shape)))
    logits = model(**right_padded_batch()).logits
    assert logits.shape == (5, 3)
    assert seen == {"norm": (1, 5, HIDDEN), "score": (1, 5, HIDDEN)}

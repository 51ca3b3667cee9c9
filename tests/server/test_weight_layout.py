from __future__ import annotations

import pytest
import torch
from torch import nn

from petals_lightning.server.weight_layout import order_weights_for_decoding


@pytest.mark.parametrize(("dtype", "by_column"), [(torch.float32, True), (torch.bfloat16, False)])
def test_float32_weights_lie_by_column_and_stay_what_they_are(dtype, by_column):
    model = nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = torch.randn(2, 8, dtype=dtype)
    expected = model(inputs)
    order_weights_for_decoding(model)
    assert (model[0].weight.stride() == (1, 5)) == by_column
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(inputs), expected)


def test_a_server_orders_what_it_has_loaded(tiny_checkpoint, start_swarm):
    (server,) = start_swarm(tiny_checkpoint("llama"), [(0, 2)]).servers
    weight = server.span.blocks[0].self_attn.q_proj.weight
    assert weight.stride(0) == 1

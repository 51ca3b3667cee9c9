"""Blocks with int8 and nf4 weights: exactly the model with the weights that transformers and bitsandbytes have."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, BitsAndBytesConfig, LlamaConfig

from petals_lightning.errors import ConfigurationError, NoServersError, UnsupportedModelError
from petals_lightning.hf import Checkpoint, quantization
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.hf.quantization import QuantizedLinear
from petals_lightning.models import AutoDistributedModelForSequenceClassification, remote_blocks
from petals_lightning.models.local import LocalModelForSequenceClassification
from petals_lightning.protocol.adapters import Adapter, LoraFactors
from petals_lightning.server.blocks.self_checks import check_quantized
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.config import ServerConfig
from petals_lightning.server.loading import load_span
from petals_lightning.server.server import Server
from petals_lightning.swarm import SwarmNode
from tests.helpers.families import ALL, COMMON, HEAVIER_BLOCKS, HIDDEN, NUM_BLOCKS, save_tiny_checkpoint
from tests.helpers.parity import assert_same_gradients, pair, right_padded_batch
from tests.helpers.spans import assert_same, inputs, run
from tests.helpers.tampering import BATCH, chosen, load_classifier, tamper
from tools.testing.tensors import relative_error

CPU = torch.device("cpu")
KINDS = ["int8", "nf4"]


def load(checkpoint: Path, quant_type: str = "none", dtype: str = "float32", span: tuple[int, int] = ALL) -> BlockSpan:
    devices = [CPU] * (span[1] - span[0])
    return load_span(Checkpoint(str(checkpoint)), *span, devices=devices, dtype=dtype, quant_type=quant_type)


def theirs(checkpoint: Path, quant_type: str, auto: Any = AutoModel) -> Any:
    """The model of transformers and bitsandbytes, dequantised: all linears but a head are."""
    kind = {"load_in_8bit": True} if quant_type == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**kind, llm_int8_skip_modules=["score"])
    with quiet_transformers():
        return auto.from_pretrained(checkpoint, quantization_config=config, dtype=torch.float32).dequantize()


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of linear modules, as [N, K], in order."""
    linears = (each for each in model.modules() if isinstance(each, torch.nn.Linear | QuantizedLinear))
    return [each.dequantized(torch.float32) if isinstance(each, QuantizedLinear) else each.weight for each in linears]


@pytest.mark.parametrize("quant_type", KINDS)
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "mixtral"])
def test_passes_are_those_of_the_dequantised_weights(family, quant_type, tiny_checkpoint):
    checkpoint = tiny_checkpoint(family)
    span, plain = load(checkpoint, quant_type), load(checkpoint)
    assert (span.quant_type, span.dtype, plain.quant_type) == (quant_type, torch.float32, "none")
    for block, own in enumerate(span.blocks):  # into a copy without any code of ours for quantised weights
        for path, linear in own.named_modules():
            if isinstance(linear, QuantizedLinear):
                plain_weight = plain.blocks[block].get_submodule(path).weight
                assert 1e-4 < relative_error(linear.weight, plain_weight) < (0.01 if quant_type == "int8" else 0.1)
                plain_weight.copy_(linear.weight)
    for given in (inputs(*ALL), inputs(1, 3, rows=[2, 5, 14]), inputs(0, 2, prefix=False, deep=False)):
        assert_same(run(span, given), run(plain, given))


@pytest.mark.parametrize("quant_type", KINDS)
def test_weights_are_those_of_transformers_and_bitsandbytes(quant_type, heavier_checkpoint):
    # Their CPU kernel unpacks nf4 right for widths that are multiples of 64, as here.
    own = weights_of(load(heavier_checkpoint, quant_type, span=(0, HEAVIER_BLOCKS)).model)
    for weight, expected in zip(own, weights_of(theirs(heavier_checkpoint, quant_type)), strict=True):
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("quant_type", KINDS)
def test_a_span_quantises_its_blocks_as_the_whole_model_does(quant_type, tiny_checkpoint):
    checkpoint = tiny_checkpoint("llama")
    whole, part = load(checkpoint, quant_type), load(checkpoint, quant_type, "bfloat16", (1, 3))
    assert part.dtype == torch.bfloat16
    for a, b in zip(weights_of(torch.nn.ModuleList(whole.blocks[1:3])), weights_of(part.model), strict=True):
        assert torch.equal(a, b)  # codes follow from the checkpoint alone, whatever the dtype of the passes


@pytest.mark.parametrize("quant_type", KINDS)
def test_gradients_of_lora_pass_through_quantised_linears(quant_type, tiny_checkpoint):
    span = load(tiny_checkpoint("llama"), quant_type)
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(NUM_BLOCKS, 2, HIDDEN, generator=draw), torch.randn(NUM_BLOCKS, HIDDEN, 2, generator=draw)
    factors = LoraFactors("self_attn.q_proj", tuple(range(NUM_BLOCKS)), a, 0.1 * b)
    plain = inputs(*ALL)
    assert plain.adapter is not None
    given = replace(plain, adapter=Adapter(*ALL, plain.adapter.deep, (factors,)))
    found = run(span, given)
    with quantization.dequantized(span.blocks):
        merged = [block.self_attn.q_proj.weight for block in span.blocks]
        for weight, own_a, own_b in zip(merged, a, 0.1 * b, strict=True):
            weight += own_b @ own_a
        expected = run(span, plain)
    assert {"grad of lora.0.a", "grad of lora.0.b"} <= found.keys()
    assert all(found[name].norm() > 1e-3 for name in found)
    assert_same({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize(("quant_type", "share"), [("int8", 0.55), ("nf4", 0.33)])
def test_quantised_blocks_take_half_or_a_third_of_the_memory(quant_type, share, heavier_checkpoint):
    plain, span = load(heavier_checkpoint, dtype="bfloat16"), load(heavier_checkpoint, quant_type, "bfloat16")
    assert span.weight_bytes(*ALL) < share * plain.weight_bytes(*ALL)
    assert span.has_sessions
    assert span.batches_sessions
    assert span.share_prefix
    assert span.skips_unread


@pytest.mark.parametrize("broken", ["backward", "forward"])
def test_a_kind_that_loses_gradients_or_outputs_is_refused(broken, tiny_checkpoint, monkeypatch):
    span, cls = load(tiny_checkpoint("llama"), "int8"), quantization._FrozenLinear
    honest = getattr(cls, broken)

    def loses(ctx, *args):
        result = honest(ctx, *args)
        return 0.9 * result if broken == "forward" else (0.9 * result[0], None)

    check_quantized(span)
    monkeypatch.setattr(cls, broken, staticmethod(loses))
    with pytest.raises(UnsupportedModelError, match=r"\(llama\) is not served with quant_type int8 on cpu") as refused:
        check_quantized(span)
    assert {"forward": "outputs", "backward": "gradients"}[broken] in str(refused.value)


def test_a_server_without_bitsandbytes_is_refused_in_one_line(tiny_checkpoint, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    for version, words in ((missing, "which is not installed"), (lambda name: "0.46.1", "this is 0.46.1")):
        monkeypatch.setattr(quantization, "version", version)
        with pytest.raises(ConfigurationError, match=rf"nf4 needs bitsandbytes 0.50 or newer, {words}: pip install"):
            Server(Checkpoint(str(tiny_checkpoint("llama"))), SwarmNode(), config=ServerConfig(quant_type="nf4"))
    with pytest.raises(ConfigurationError, match="quant_type is 'fp4': choose none, int8 or nf4"):
        ServerConfig(quant_type="fp4")


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", KINDS)
def test_training_through_quantised_servers_is_that_of_a_local_model(quant_type, heavier_checkpoint, start_swarm):
    checkpoint = heavier_checkpoint
    swarm = start_swarm(checkpoint, [(0, 1), (1, HEAVIER_BLOCKS)], quant_types=[quant_type] * 2)
    autos = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification
    remote, local = pair(*autos, checkpoint, swarm, "deep_ptune", num_labels=3)
    own = theirs(checkpoint, quant_type, AutoModelForSequenceClassification)
    for path, linear in own.model.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            local.model.layers.get_submodule(path).weight = linear.weight.requires_grad_(False)
    losses = [model(**right_padded_batch()).loss for model in (remote, local)]
    torch.autograd.backward(losses)
    assert relative_error(*losses) < 1e-5
    assert_same_gradients(remote, local, 1e-4)
    assert {record.quant_type for record in (server.record for server in swarm.servers)} == {quant_type}


@pytest.mark.slow
def test_clients_choose_kinds_of_weights(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [ALL, ALL], quant_types=["none", "nf4"])
    batch = right_padded_batch()
    for kind, server in zip(("none", "nf4"), swarm.servers, strict=True):
        torch.manual_seed(0)
        model = swarm.load(AutoDistributedModelForSequenceClassification, allowed_quantization=[kind], num_labels=3)
        with torch.no_grad():
            model(**batch)
        assert {span.peer_id for span in remote_blocks(model).route()} == {server.node.peer_id.to_base58()}
    with pytest.raises(NoServersError, match=r"2 server\(s\) are excluded by .* or allowed_quantization"):
        swarm.load(AutoDistributedModelForSequenceClassification, allowed_quantization="int8", num_labels=3)
    with pytest.raises(ConfigurationError, match=r"allowed_quantization is .*: choose of none, int8, nf4"):
        swarm.load(AutoDistributedModelForSequenceClassification, allowed_quantization="int4", num_labels=3)


@pytest.mark.slow
def test_audits_know_the_kinds_of_weights(tiny_checkpoint, start_swarm, caplog):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL, ALL], quant_types=["nf4", "none", "nf4"])
    model = load_classifier(swarm, audit_rate=1.0, allowed_quantization=["nf4"])
    liar = chosen(model, swarm)
    tamper(liar, lambda hidden: 1.01 * hidden)
    with torch.no_grad():
        model(**BATCH)
    assert liar.node.peer_id.to_base58() in caplog.text  # the other nf4 server has the same weights, and the judge too
    assert "lies: its result is 0.0" in caplog.text
    mixed = load_classifier(swarm, audit_rate=1.0, blocked_servers=[liar.node.peer_id.to_base58()])
    caplog.clear()
    with torch.no_grad():
        mixed(**BATCH)  # honest servers of two kinds
    assert remote_blocks(mixed).stats.audits >= 1
    assert "audit" not in caplog.text
    assert remote_blocks(mixed).stats.retries == 0


def save_in_fp8(folder: Path, plain: Path) -> None:
    """Saves a random Llama in FP8, as DeepSeek's and Qwen's are, and the same with its weights dequantised."""
    save_tiny_checkpoint(LlamaConfig(**COMMON | {"intermediate_size": 64}, num_key_value_heads=4), folder)
    save_tiny_checkpoint(LlamaConfig(**COMMON | {"intermediate_size": 64}, num_key_value_heads=4), plain)
    # Copies: those that were read are mapped from the file, which is written anew below.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    size = 16
    values = dict(tensors)
    for name, weight in list(tensors.items()):
        if not name.endswith("proj.weight"):
            continue
        n, k = (length // size for length in weight.shape)
        tiles = weight.view(n, size, k, size)
        scales = tiles.abs().amax((1, 3)) / 448
        codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        values[name] = (codes.float() * scales[:, None, :, None]).view_as(weight)
        tensors |= {name: codes.view(weight.shape), f"{name}_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [size, size]
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def test_an_fp8_checkpoint_is_served_dequantised(tmp_path):
    fp8, plain = tmp_path / "fp8", tmp_path / "plain"
    save_in_fp8(fp8, plain)
    for span in (ALL, (1, 3)):
        assert_same(run(load(fp8, span=span), inputs(*span)), run(load(plain, span=span), inputs(*span)))
    assert_same(run(load(fp8, "nf4"), inputs(*ALL)), run(load(plain, "nf4"), inputs(*ALL)))

"""Tuning on dialogues: the loss of a swarm's run is that of a local one, of the full computation, and it falls."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from petals_lightning.data import DialogueDataModule, PlainTextDataModule, TextDataModule
from petals_lightning.models import AutoDistributedModelForCausalLM, prompts_of, remote_blocks
from petals_lightning.models.local import LocalModelForCausalLM
from petals_lightning.models.reading import token_logits
from petals_lightning.modules import CausalLMModule
from petals_lightning.sample import MODEL_DIR
from petals_lightning.strategies import PrivateSwarm, RemoteBlockStrategy
from tests.helpers.families import VOCAB
from tools.testing.swarms import PREFIX


class Trace(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.perplexities: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, *args) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer, module) -> None:
        self.perplexities.append(float(trainer.callback_metrics["val/perplexity"]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "bloom"])
def test_chosen_logits_and_gradients_are_those_of_the_full_computation(family, tiny_checkpoint, start_swarm):
    """Gemma 2 caps its logits and Granite scales them: that must happen to the chosen ones, too."""
    checkpoint = tiny_checkpoint(family)
    options: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": 3}
    swarm, models = start_swarm(checkpoint, [(0, 2), (2, 4)]), []
    for load in (
        lambda: swarm.load(AutoDistributedModelForCausalLM, **options),
        lambda: LocalModelForCausalLM.from_pretrained(str(checkpoint), **options),
    ):
        torch.manual_seed(0)
        models.append(load())
    ids, rows = torch.randint(1, VOCAB, (3, 8)), torch.tensor([2, 9, 10, 23])
    full = models[1](input_ids=ids).logits.flatten(0, 1)[rows]
    full.square().mean().backward()
    expected = prompts_of(models[1]).deep.grad.clone()
    before = remote_blocks(models[0]).stats.bytes_received
    for model in models:
        model.zero_grad()
        logits = token_logits(model, ids, rows)
        assert torch.allclose(logits, full, atol=1e-4)
        logits.square().mean().backward()
        assert torch.allclose(prompts_of(model).deep.grad, expected, atol=1e-5 * expected.abs().max().item() + 1e-7)
    assert remote_blocks(models[0]).stats.bytes_received > before
    assert models[0](input_ids=ids).logits.shape == (3, 8, VOCAB), "the model is as it was"


def fit(model: str, data: TextDataModule, folder, strategy, epochs: int, **settings) -> Trace:
    torch.manual_seed(0)
    trace = Trace()
    trainer = pl.Trainer(
        default_root_dir=str(folder), max_epochs=epochs, accelerator="cpu", strategy=strategy, callbacks=[trace],
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=-1, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(CausalLMModule(model, dht_prefix=PREFIX, **settings), datamodule=data)
    return trace


@pytest.mark.slow
def test_tuning_on_real_dialogues_lowers_perplexity_as_a_local_run_does(shared_data, start_swarm, tmp_path):
    model = str(shared_data / "models" / "stories260K")
    swarm = start_swarm(model, [(0, 2), (2, 5)])
    traces = []
    for strategy in (RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers)), "auto"):
        data = DialogueDataModule(
            model, str(shared_data / "dialogue" / "self_dialogue"), limit=24, max_length=64, batch_size=8
        )
        traces.append(fit(model, data, tmp_path, strategy, 1, tuning_mode="deep_ptune", pre_seq_len=8, lr=1e-2))
    before, after = assert_same_course(*traces)
    assert after < 0.8 * before


def assert_same_course(remote: Trace, local: Trace) -> tuple[float, float]:
    """The validation perplexities before and after training."""
    assert len(remote.losses) > 20
    assert remote.losses == pytest.approx(local.losses, rel=1e-4)
    assert remote.perplexities == pytest.approx(local.perplexities, rel=1e-3)
    before, after = remote.perplexities[0], remote.perplexities[-1]
    print(f"validation perplexity {before:.1f} → {after:.1f} in {len(remote.losses)} steps")
    return before, after


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DialogueDataModule, PlainTextDataModule])
def test_tuning_on_the_bundled_sample_lowers_perplexity_as_a_local_run_does(kind, start_swarm, tmp_path):
    swarm = start_swarm(MODEL_DIR, [(0, 2), (2, 4)])
    traces = []
    for strategy in (RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers)), "auto"):
        data = kind(str(MODEL_DIR), max_length=64)
        data.setup()
        for split, samples in data._splits.items():  # a part of it is enough
            data._splits[split] = type(samples)(samples._samples[: 400 if split == "train" else 60])
        traces.append(fit(str(MODEL_DIR), data, tmp_path, strategy, 2, pre_seq_len=8, lr=3e-2))
    before, after = assert_same_course(*traces)
    assert after < (0.7 if kind is DialogueDataModule else 0.9) * before

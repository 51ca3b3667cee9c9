"""Of a multimodal model only the text decoder is read, under whatever names its checkpoint has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from petals_lightning.errors import UnsupportedModelError
from petals_lightning.hf import Checkpoint, ModelSlice, load_pruned
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.hf.decoder import model_class, text_decoder_in
from tests.helpers.families import NUM_BLOCKS, WRAPPER_CONFIGS, save_tiny_checkpoint


def load(folder: Path, part: ModelSlice, auto_class=AutoModel):
    checkpoint = Checkpoint(str(folder))
    return load_pruned(model_class(auto_class, checkpoint), checkpoint, part).model


def tensors_read(folder: Path, part: ModelSlice, auto_class, monkeypatch) -> set[str]:
    seen: set[str] = set()
    read = Checkpoint.tensors

    def noted(self, names, *args, **options):
        seen.update(names)
        return read(self, names, *args, **options)

    monkeypatch.setattr(Checkpoint, "tensors", noted)
    load(folder, part, auto_class)
    return seen


def renamed(folder: Path, pattern: str, new: str) -> None:
    """The checkpoint in `folder` as another version of transformers would have written it."""
    tensors = {re.sub(pattern, new, name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", WRAPPER_CONFIGS)
def test_only_the_tensors_of_the_part_are_read(family, tmp_path, monkeypatch):
    folder = save_tiny_checkpoint(WRAPPER_CONFIGS[family](), tmp_path)
    names = set(Checkpoint(str(folder)).shard_of)
    towers = {name for name in names if re.search("vision|visual|multi_modal|projector", name)}
    block = {name for name in names - towers if ".layers.2." in name}
    ends = {name for name in names - towers if ".layers." not in name}
    assert towers
    assert block
    assert ends
    assert tensors_read(folder, ModelSlice(2, 3, with_embeddings_and_head=False), AutoModel, monkeypatch) == block
    assert (
        tensors_read(folder, ModelSlice(0, 0, with_embeddings_and_head=True), AutoModelForCausalLM, monkeypatch) == ends
    )


OLD_TO_NEW = r"^language_model\.(model\.)?(?!lm_head)", "model.language_model."
NEW_TO_OLD = r"^model\.language_model\.", "language_model.model."


@pytest.mark.parametrize("family", ["gemma3", "llava", "mistral3"])
@pytest.mark.parametrize("names", [OLD_TO_NEW, NEW_TO_OLD], ids=["new names", "old names"])
def test_old_and_new_names_give_the_same_blocks(names, family, tmp_path):
    folder = save_tiny_checkpoint(WRAPPER_CONFIGS[family](), tmp_path)
    with quiet_transformers():
        plain: Any = AutoModelForImageTextToText.from_pretrained(folder)
    whole: Any = text_decoder_in(plain, plain.config.get_text_config())[1]
    renamed(folder, *names)
    part = load(folder, ModelSlice(1, 3, with_embeddings_and_head=False))
    for mine, block in zip(part.layers, whole.layers[1:3], strict=True):
        for (name, got), (_, expected) in zip(mine.named_parameters(), block.named_parameters(), strict=True):
            assert torch.equal(got, expected), name
    ends: Any = load(folder, ModelSlice(0, 0, with_embeddings_and_head=True), AutoModelForCausalLM)
    assert torch.equal(ends.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert torch.equal(ends.get_output_embeddings().weight, plain.get_output_embeddings().weight)


def test_names_that_are_renamed_at_load_are_found_in_plain_decoders_too(tmp_path):
    """Blocks of Qwen2-VL's first checkpoints are `model.layers`, beside `visual`."""
    folder = save_tiny_checkpoint(WRAPPER_CONFIGS["qwen2_vl"](), tmp_path)
    renamed(folder, r"^(model\.)?language_model\.", "model.")
    renamed(folder, r"^model\.visual\.", "visual.")
    with quiet_transformers():
        plain = AutoModelForImageTextToText.from_pretrained(folder)
    part = load(folder, ModelSlice(NUM_BLOCKS - 1, NUM_BLOCKS, with_embeddings_and_head=False))
    expected = plain.model.language_model.layers[-1].mlp.up_proj.weight
    assert torch.equal(part.layers[0].mlp.up_proj.weight, expected)


def test_a_wrapper_whose_logits_are_its_own_is_refused(tmp_path, monkeypatch):
    folder = save_tiny_checkpoint(WRAPPER_CONFIGS["qwen2_vl"](), tmp_path)
    cls = model_class(AutoModelForCausalLM, Checkpoint(str(folder)))
    assert cls.__name__ == "Qwen2VLTextForCausalLM"
    wrapper: Any = AutoModelForImageTextToText._model_mapping[type(Checkpoint(str(folder)).config)]
    forward = wrapper.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(wrapper, "forward", scaled)
    with pytest.raises(UnsupportedModelError, match="logits in a way of its own"):
        model_class(AutoModelForCausalLM, Checkpoint(str(folder)))

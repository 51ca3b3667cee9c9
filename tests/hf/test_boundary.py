"""transformers' inner names are known in one module; a release that renames one is noticed at load."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
import torch
from transformers import GPT2Model, LlamaModel

import petals_lightning
from petals_lightning.errors import UnsupportedModelError
from petals_lightning.hf import compat
from petals_lightning.models import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification

INNER_NAMES = {
    "past_key_values", "past_key_value", "layer_past", "cache_params", "cache_position", "logits_to_keep",
    "num_logits_to_keep", "CacheLayerMixin", "DynamicCache", "DynamicLayer", "get_max_cache_shape", "cached_file",
    "_model_mapping", "_prepare_cache_for_generation", "_eos_token_tensor", "_supports_default_dynamic_cache",
    "_raise_exceptions_for_missing_entries", "_checkpoint_conversion_mapping",
}  # fmt: skip
PACKAGE = Path(petals_lightning.__file__).parent
BOUNDARY = PACKAGE / "hf" / "compat.py"


def inner_names(source: str) -> set[str]:
    """Names, attributes, keywords and whole strings of a module that are transformers' own affair."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            found.add(f"from {node.module} import …")
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("transformers.")}
        names = (getattr(node, field, None) for field in ("id", "attr", "arg", "name", "value"))
        found |= {name for name in names if isinstance(name, str) and name in INNER_NAMES}
    return found


def test_inner_names_are_in_the_boundary_only():
    modules = sorted(PACKAGE.rglob("*.py"))
    assert BOUNDARY in modules
    elsewhere = {str(path): inner_names(path.read_text()) for path in modules if path != BOUNDARY}
    assert {path: names for path, names in elsewhere.items() if names} == {}


def test_the_search_for_inner_names_sees_them():
    assert inner_names(BOUNDARY.read_text()) >= {"past_key_values", "_model_mapping", "cached_file", "CacheLayerMixin"}
    assert inner_names("model(x, past_key_values=None)") == {"past_key_values"}
    assert inner_names("kwargs['logits_to_keep'] = 1") == {"logits_to_keep"}
    assert inner_names("from transformers.models.llama import LlamaModel") == {
        "from transformers.models.llama import …"
    }


def renamed(forward):
    """As in a release that calls the cache by a name that nobody knows."""

    def new(self, *args, key_value_state=None, **kwargs):
        return forward(self, *args, **kwargs)

    return new


def dropped(forward):
    """As in a release that takes the known name and does not use it (5.24 did so with the name before)."""

    @functools.wraps(forward)
    def new(self, *args, **kwargs):
        compat.pop_cache(kwargs)
        return forward(self, *args, **kwargs)

    return new


def unheeded(forward):
    """As in a release that hands the cache to blocks, and counts positions without it."""

    @functools.wraps(forward)
    def new(self, *args, **kwargs):
        embeds = kwargs["inputs_embeds"]
        kwargs["position_ids"] = torch.arange(embeds.shape[1])[None]
        return forward(self, *args, **kwargs)

    return new


CLASSES = {"training": AutoDistributedModelForSequenceClassification, "generation": AutoDistributedModelForCausalLM}


@pytest.mark.parametrize("use", CLASSES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, "takes no cache under a name that is known here"),
        (dropped, "does not pass its cache on to its blocks"),
        (unheeded, "the positions of tokens that follow a prefix would be wrong here"),
    ],
)
def test_a_renamed_cache_is_refused_when_a_model_is_loaded(
    use, change, words, tiny_checkpoint, start_swarm, monkeypatch
):
    swarm = start_swarm(tiny_checkpoint("gpt2"), [(0, 4)])
    monkeypatch.setattr(GPT2Model, "forward", change(GPT2Model.forward))
    with pytest.raises(UnsupportedModelError, match=words) as refused:
        swarm.load(CLASSES[use], shared_peer=True, tuning_mode="deep_ptune", pre_seq_len=3)
    assert compat.versions() in str(refused.value)
    assert "GPT2" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_whose_cache_is_renamed_is_not_served(tiny_checkpoint, start_swarm, monkeypatch):
    monkeypatch.setattr(LlamaModel, "forward", renamed(LlamaModel.forward))
    with pytest.raises(UnsupportedModelError, match="takes no cache under a name that is known here"):
        start_swarm(tiny_checkpoint("llama"), [(0, 4)])


def test_a_generate_that_makes_its_cache_elsewhere_is_refused(tiny_checkpoint, start_swarm, monkeypatch):
    """As in a release that renames the private method in which it asks for a cache."""
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)])
    monkeypatch.delattr(compat.CacheFromOutside, "_prepare_cache_for_generation")
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM \(llama\) of transformers"):
        swarm.load(AutoDistributedModelForCausalLM, shared_peer=True)


def test_a_head_that_reads_another_position_is_refused(tiny_checkpoint, start_swarm, monkeypatch):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)])
    rule = AutoDistributedModelForSequenceClassification.mixin._last_tokens

    def first_tokens(self, input_ids, inputs_embeds, attention_mask):
        rows, length = rule(self, input_ids, inputs_embeds, attention_mask)
        return rows - rows % length, length

    monkeypatch.setattr(AutoDistributedModelForSequenceClassification.mixin, "_last_tokens", first_tokens)
    with pytest.raises(UnsupportedModelError, match="the position that is classified would be wrong here"):
        swarm.load(AutoDistributedModelForSequenceClassification, shared_peer=True, num_labels=3)


def test_a_cache_goes_back_as_old_and_new_versions_ask():
    class Layer(compat.CacheLayer):
        length = 9

        def lazy_initialization(self, key_states, value_states): ...

        def update(self, key_states, value_states, *args, **kwargs): ...

        def get_seq_length(self):
            return self.length

        def keep_first(self, length):
            self.length = length

    layer = Layer()
    for asked, left in ((0, 9), (-2, 7), (5, 5), (8, 5), (-9, 0)):
        layer.crop(asked)
        assert layer.length == left
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1

"""Names of blocks are those that Petals gives, so that both find each other's servers."""

from __future__ import annotations

import pytest

from petals_lightning.errors import ConfigurationError
from petals_lightning.protocol.uids import block_uid, check_dht_prefix, derive_dht_prefix


@pytest.mark.parametrize(
    ("repository", "model_type", "prefix"),
    [
        ("meta-llama/Llama-2-7b", "llama", "Llama-2-7b-hf"),
        ("meta-llama/Llama-2-7b-hf", "llama", "Llama-2-7b-hf"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama", "Meta-Llama-3-1-8B-hf"),
        ("tiiuae/falcon-40b", "falcon", "falcon-40b"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral", "mistralai/Mixtral-8x7B-v0-1"),
        ("bigscience/bloom-7b1", "bloom", "bigscience/bloom-7b1-petals"),
        ("Qwen/Qwen2.5-7B", "qwen2", "Qwen2-5-7B"),
        ("gpt2", "gpt2", "gpt2"),
    ],
)
def test_hub_ids_get_the_prefix_of_petals(repository, model_type, prefix):
    assert derive_dht_prefix(repository, model_type, is_local=False) == prefix
    assert block_uid(prefix, 17) == f"{prefix}.17"


def test_a_local_folder_needs_a_prefix_by_hand():
    with pytest.raises(ConfigurationError, match=r"/models/mine.*--dht-prefix"):
        derive_dht_prefix("/models/mine", "llama", is_local=True)


@pytest.mark.parametrize("prefix", ["", "a.b", "a b", "a\tb", "a\n", "."])
def test_prefixes_that_would_break_uids_are_refused(prefix):
    with pytest.raises(ConfigurationError, match="dht_prefix"):
        check_dht_prefix(prefix)


def test_the_refusal_of_a_prefix_proposes_a_good_one():
    with pytest.raises(ConfigurationError, match=r"'Llama-3-1-8B'"):
        check_dht_prefix("Llama-3.1 8B")

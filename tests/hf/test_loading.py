"""Loading a part of a checkpoint reads that part, and what is wrong with a checkpoint is said in one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from petals_lightning.errors import CheckpointError, UnsupportedModelError
from petals_lightning.hf import Checkpoint, ModelSlice, load_pruned
from petals_lightning.hf import checkpoint as checkpoint_module
from petals_lightning.hf.decoder import model_class
from petals_lightning.models.local import LocalModel, LocalModelForCausalLM, LocalModelForSequenceClassification
from tests.helpers.families import HIDDEN, TINY_CONFIGS, VOCAB, save_tiny_checkpoint

BLOCKS = 8


def llama(num_hidden_layers: int = BLOCKS) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=num_hidden_layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A Llama of 8 blocks in at least 6 shards."""
    folder = save_tiny_checkpoint(llama(), tmp_path_factory.mktemp("sharded"), max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) >= 6
    return folder


@pytest.fixture
def reads(monkeypatch) -> dict[str, Any]:
    """Shards that were opened, and bytes that were read from them through lazy slices."""
    seen: dict[str, Any] = {"shards": set(), "bytes": 0}
    real = checkpoint_module.safe_open  # type: ignore[attr-defined]

    class Slice:
        def __init__(self, inner: Any):
            self._inner = inner

        def __getitem__(self, index: Any) -> torch.Tensor:
            tensor = self._inner[index]
            seen["bytes"] += tensor.numel() * tensor.element_size()
            return tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    class File:
        def __init__(self, path: Path, **options: Any):
            seen["shards"].add(Path(path).name)
            self._opened = real(path, **options)

        def __enter__(self) -> File:
            self._file = self._opened.__enter__()
            return self

        def __exit__(self, *exc_info: object) -> None:
            self._opened.__exit__(*exc_info)

        def keys(self) -> list[str]:
            return self._file.keys()

        def get_slice(self, name: str) -> Slice:
            return Slice(self._file.get_slice(name))

    monkeypatch.setattr(checkpoint_module, "safe_open", File)
    return seen


def load(folder: Path, part: ModelSlice, auto_class: Any = AutoModel, **options: Any) -> Any:
    checkpoint = Checkpoint(str(folder))
    return load_pruned(model_class(auto_class, checkpoint), checkpoint, part, **options)[0]


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def shards_of(folder: Path, wanted: Any) -> set[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {shard for name, shard in index.items() if wanted(name)}


def test_a_server_opens_only_the_shards_of_its_blocks_and_reads_only_them(sharded, reads):
    told = []
    model = load(sharded, ModelSlice(2, 4, with_embeddings_and_head=False), on_shard=lambda *args: told.append(args))
    expected = shards_of(sharded, lambda name: ".layers.2." in name or ".layers.3." in name)
    assert reads["shards"] == expected
    assert len(expected) < len(list(sharded.glob("*.safetensors"))) / 2
    assert reads["bytes"] == size(model)
    assert [name for name, _, _ in told] == sorted(expected)
    assert [(number, count) for _, number, count in told] == [(n + 1, len(expected)) for n in range(len(expected))]


def test_a_client_opens_only_the_shards_of_the_ends_and_reads_only_them(sharded, reads):
    model = load(sharded, ModelSlice(0, 0, with_embeddings_and_head=True), AutoModelForCausalLM)
    assert reads["shards"] == shards_of(sharded, lambda name: ".layers." not in name)
    assert reads["bytes"] == size(model) == (2 * VOCAB * HIDDEN + HIDDEN) * 4


def test_a_part_has_the_values_of_the_whole(sharded):
    whole = AutoModel.from_pretrained(sharded)
    part = load(sharded, ModelSlice(2, 4, with_embeddings_and_head=False))
    for mine, block in zip(part.layers, whole.layers[2:4], strict=True):
        for (name, got), (_, expected) in zip(mine.named_parameters(), block.named_parameters(), strict=True):
            assert torch.equal(got, expected), name
    ends = load(sharded, ModelSlice(0, 0, with_embeddings_and_head=True), AutoModelForCausalLM)
    assert torch.equal(ends.get_input_embeddings().weight, whole.embed_tokens.weight)
    assert torch.equal(ends.model.norm.weight, whole.norm.weight)
    assert len(ends.model.layers) == 0


@pytest.mark.parametrize("family", ["llama", "bloom", "falcon", "mixtral", "gpt2"])
def test_a_clients_size_does_not_depend_on_the_number_of_blocks(family, tmp_path):
    sizes = []
    for count in (2, 5):
        config = TINY_CONFIGS[family]()
        config.num_hidden_layers = count
        folder = save_tiny_checkpoint(config, tmp_path / str(count))
        sizes.append(size(load(folder, ModelSlice(0, 0, with_embeddings_and_head=True), AutoModelForCausalLM)))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("is_zip", [True, False])  # False: as written before torch 1.6
def test_bin_checkpoints_load(shards, is_zip, sharded, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(sharded)
    whole.config.save_pretrained(tmp_path)
    state = list(whole.state_dict().items())
    if shards == 1:
        torch.save(dict(state), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    else:
        names: dict[str, str] = {}
        for number in range(shards):
            file = tmp_path / f"pytorch_model-{number}.bin"
            torch.save(dict(state[number::shards]), file, _use_new_zipfile_serialization=is_zip)
            names |= {name: f"pytorch_model-{number}.bin" for name, _ in state[number::shards]}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    part = load(tmp_path, ModelSlice(6, 8, with_embeddings_and_head=False))
    assert torch.equal(part.layers[1].mlp.up_proj.weight, whole.model.layers[7].mlp.up_proj.weight)
    ends = load(tmp_path, ModelSlice(0, 0, with_embeddings_and_head=True), AutoModelForCausalLM)
    assert torch.equal(ends.lm_head.weight, whole.lm_head.weight)


@pytest.mark.parametrize("kind", ["gptq", "awq", "bitsandbytes", "a new one"])
def test_quantised_checkpoints_that_cannot_be_dequantised_are_refused_in_one_line(kind, tmp_path):
    folder = save_tiny_checkpoint(TINY_CONFIGS["llama"](), tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": kind}}
    (folder / "config.json").write_text(json.dumps(config))
    for part in (ModelSlice(0, 2, with_embeddings_and_head=False), ModelSlice(0, 0, with_embeddings_and_head=True)):
        with pytest.raises(
            UnsupportedModelError, match=rf"is quantised \({kind}\), which transformers cannot undo while it loads"
        ):
            load(folder, part)


def test_safetensors_are_preferred_to_bin_files_beside_them(tmp_path):
    folder = save_tiny_checkpoint(llama(2), tmp_path)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model-1.bin"}}))
    assert set(Checkpoint(str(folder)).shard_of.values()) == {"model.safetensors"}


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", "bfloat16"), ("float16", "float16"), (torch.float32, "float32")]
)
def test_weights_take_the_dtype_asked_for_and_by_default_the_checkpoints(dtype, expected, tmp_path):
    config = llama(2)
    config.dtype = torch.bfloat16
    folder = save_tiny_checkpoint(config, tmp_path)
    assert Checkpoint(str(folder)).config.dtype == torch.bfloat16
    model = load(folder, ModelSlice(0, 1, with_embeddings_and_head=False), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, expected)}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def break_tensors(folder: Path, change: Any) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_missing_tensors_are_named(tmp_path):
    folder = save_tiny_checkpoint(llama(3), tmp_path)
    break_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing: layers\.0\.mlp\.up_proj\.weight"):
        load(folder, ModelSlice(1, 3, with_embeddings_and_head=False))
    load(folder, ModelSlice(2, 3, with_embeddings_and_head=False))  # what is missing is not in this part
    break_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight"):
        load(folder, ModelSlice(0, 0, with_embeddings_and_head=True), AutoModelForCausalLM)


def test_tensors_of_another_shape_are_named(tmp_path):
    folder = save_tiny_checkpoint(llama(2), tmp_path)
    break_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(HIDDEN + 1)}))
    with pytest.raises(CheckpointError, match=r"of another shape: .*norm\.weight"):
        load(folder, ModelSlice(0, 0, with_embeddings_and_head=True))


def copy_files(source: Path, target: Path) -> None:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def test_a_missing_shard_is_named(sharded, tmp_path):
    copy_files(sharded, tmp_path)
    (shard,) = shards_of(sharded, lambda name: name == "model.layers.0.mlp.up_proj.weight")
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=shard):
        load(tmp_path, ModelSlice(0, 1, with_embeddings_and_head=False))


@pytest.mark.parametrize("auto_class", [LocalModel, LocalModelForCausalLM, LocalModelForSequenceClassification])
def test_a_missing_or_damaged_shard_is_named_in_one_process(auto_class, sharded, tmp_path):
    copy_files(sharded, tmp_path)
    (shard,) = shards_of(sharded, lambda name: name == "model.layers.0.mlp.up_proj.weight")
    (tmp_path / shard).write_bytes((tmp_path / shard).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard} is damaged or incomplete"):
        auto_class.from_pretrained(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=rf"the shard {shard} is missing"):
        auto_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "how"),
    [("{", "no JSON"), ("{}", "no JSON object with a weight_map"), ('{"weight_map": [1]}', "file name")],
)
def test_a_damaged_index_is_named(content, how, sharded, tmp_path):
    copy_files(sharded, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"index\.json is damaged .*{how}"):
        load(tmp_path, ModelSlice(0, 1, with_embeddings_and_head=False))


def test_a_damaged_shard_is_named(sharded, tmp_path):
    """As an interrupted download leaves it, and one that belongs to another model."""
    (shard,) = shards_of(sharded, lambda name: name == "model.layers.0.mlp.up_proj.weight")
    copy_files(sharded, tmp_path)
    (tmp_path / shard).write_bytes((sharded / shard).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{shard} is damaged or incomplete .*download it again"):
        load(tmp_path, ModelSlice(0, 1, with_embeddings_and_head=False))
    save_file({"other": torch.ones(1)}, tmp_path / shard)
    with pytest.raises(CheckpointError, match=rf"{shard} is damaged or incomplete .*lacks"):
        load(tmp_path, ModelSlice(0, 1, with_embeddings_and_head=False))


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no weights.*model\.safetensors"):
        load(tmp_path, ModelSlice(0, 1, with_embeddings_and_head=False))


def test_a_folder_without_config_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path, ModelSlice(0, 1, with_embeddings_and_head=False))


def test_an_unknown_architecture_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cleverformer"}))
    with pytest.raises(UnsupportedModelError, match="architecture that transformers does not know"):
        load(tmp_path, ModelSlice(0, 1, with_embeddings_and_head=False))


def test_a_config_that_is_no_json_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read model"):
        load(tmp_path, ModelSlice(0, 1, with_embeddings_and_head=False))


def test_an_encoder_decoder_says_so(tmp_path):
    config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    transformers.T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load(tmp_path, ModelSlice(0, 1, with_embeddings_and_head=False))


def test_an_encoder_has_no_class_for_causal_language_models(tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no class for AutoModelForCausalLM"):
        load(tmp_path, ModelSlice(0, 1, with_embeddings_and_head=False), AutoModelForCausalLM)


@pytest.mark.parametrize(("start", "end"), [(0, 9), (-1, 2), (5, 4)])
def test_blocks_that_do_not_exist_are_refused(start, end, sharded):
    with pytest.raises(UnsupportedModelError, match=f"{start}:{end} of a model that has 8"):
        load(sharded, ModelSlice(start, end, with_embeddings_and_head=False))


def test_the_fingerprint_tells_models_apart_and_not_their_copies(sharded, tmp_path):
    mine = Checkpoint(str(sharded)).fingerprint
    copy = save_tiny_checkpoint(llama(), tmp_path / "copy", seed=1)  # one file, other weights: a finetune
    config = llama()
    assert Checkpoint(str(copy)).fingerprint == mine
    config.rms_norm_eps = 0.5
    other = save_tiny_checkpoint(config, tmp_path / "other")
    assert Checkpoint(str(other)).fingerprint != mine

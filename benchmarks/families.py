"""Which families of decoders are served exactly, tried with a tiny random model of each: `python -m benchmarks.families`.

Each model runs on two servers on this machine, with deep prompts and padded samples, and is compared with the family's
own class of transformers: logits, gradients of the prompts, class scores, and what `generate` writes. The table is
printed, and written with `--output`; docs/families.md is made so. `--family` tries some only.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import gc
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from benchmarks.tiny_configs import VOCABULARY, families, tiny_config
from petals_lightning.errors import PetalsLightningError, RemoteRequestError, UnsupportedModelError
from petals_lightning.hf import Checkpoint, find_blocks
from petals_lightning.hf.checkpoint import first_line
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.hf.decoder import text_decoder_in
from petals_lightning.hf.skeleton import num_blocks
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    prompts_of,
    remote_blocks,
)
from petals_lightning.server.server import Server
from petals_lightning.swarm import SwarmNode

_P, _B, _S, _NEW = 3, 4, 9, 6
_EXACT = 1e-5
_NAME = "family"


@dataclass
class Verdict:
    """A row of the table."""

    family: str
    training: str
    sessions: str = ""
    note: str = ""
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", help="model_type; may be given several times; all by default")
    parser.add_argument("--output", type=Path, help="also write the table there, as Markdown")
    parser.add_argument("--traceback", action="store_true", help="print what went wrong in full")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    known = families()
    for name in args.family or ():
        if name not in known:
            parser.error(f"--family {name}: not a decoder that transformers {transformers.__version__} knows")
    print(_HEAD, flush=True)
    rows = []
    for name in args.family or known:
        rows.append(check(name, known[name], show=args.traceback))
        print(_row(rows[-1]), flush=True)
        gc.collect()
    if args.output is not None:
        args.output.write_text(document(rows))


def check(family: str, auto_class: Any, *, show: bool = False) -> Verdict:
    """Serves a tiny random model of a family, and uses it."""
    began = time.monotonic()
    try:
        config = tiny_config(family)
        torch.manual_seed(0)
        with quiet_transformers():
            model = auto_class.from_config(config).eval()
        _spread(model)
        with torch.no_grad():
            model(input_ids=_batch()["input_ids"])
    except Exception as e:
        if show:
            traceback.print_exc()
        return Verdict(family, "not tried", note=f"no tiny model of it could be made ({type(e).__name__}: {_short(e)})")
    with tempfile.TemporaryDirectory() as folder:
        with quiet_transformers():
            model.save_pretrained(folder)
        del model
        try:
            verdict = _tried(family, auto_class, folder)
        except UnsupportedModelError as e:
            verdict = Verdict(family, "refused", "refused", _short(e))
        except Exception as e:
            if show:
                traceback.print_exc()
            verdict = Verdict(family, "FAILED", note=f"{type(e).__name__}: {_short(e)}")
    verdict.seconds = time.monotonic() - began
    return verdict


def _tried(family: str, auto_class: Any, folder: str) -> Verdict:
    count = num_blocks(Checkpoint(folder).config)
    with contextlib.ExitStack() as stack:
        peers: list[str] = []
        for span in ((0, 1), (1, count)):
            server = Server(
                Checkpoint(folder), SwarmNode(peers, host_maddrs=["/ip4/127.0.0.1/tcp/0"]), block_indices=span,
                dht_prefix=_NAME, dtype="float32", throughput=1.0, update_period=60,
            )  # fmt: skip
            server.start()
            stack.callback(server.stop, 0.5)
            peers = peers or server.node.visible_maddrs()
        node = stack.enter_context(contextlib.closing(SwarmNode(peers, host_maddrs=(), client_mode=True).start()))
        options = {"node": node, "dht_prefix": _NAME, "dtype": torch.float32}
        with quiet_transformers():
            plain = auto_class.from_pretrained(folder, dtype=torch.float32).eval()
        errors = _train(stack, folder, plain, options)
        errors |= _classify(stack, folder, options)
        wrong = {name: error for name, error in errors.items() if not error < _EXACT}
        training = f"WRONG ({', '.join(f'{k} {v:.0e}' for k, v in wrong.items())})" if wrong else "exact"
        note = "" if "class scores" in errors else "no class for sequence classification"
        try:
            wrong = _generate(stack, folder, plain, options)
        except RemoteRequestError as e:
            return Verdict(family, training, "refused", "; ".join(filter(None, [note, "keeps a recurrent state"])))
        return Verdict(family, training, f"WRONG ({', '.join(wrong)})" if wrong else "exact", note)


def _train(stack: contextlib.ExitStack, folder: str, plain: Any, options: dict[str, Any]) -> dict[str, float]:
    model = AutoDistributedModelForCausalLM.from_pretrained(
        folder, tuning_mode="deep_ptune", pre_seq_len=_P, **options
    )
    stack.callback(remote_blocks(model).close)
    prompts = prompts_of(model)
    with torch.no_grad():
        prompts.input.normal_(0, 0.3)
        prompts.deep.normal_(0, 0.3)
    batch = _batch()
    logits = model(**batch).logits
    expected, given, deep = _plain_logits(plain, prompts, batch)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)) * batch["attention_mask"][..., None]
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    real = batch["attention_mask"].bool()
    return {
        "logits": _error(logits[real], expected[real]),
        "prompt gradients": _error(prompts.input.grad, given.grad),
        "deep gradients": _error(prompts.deep.grad, deep.grad),
    }


def _plain_logits(
    plain: PreTrainedModel, prompts: Any, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [B, S, V] of the family's own class with prompts concatenated, and the leaves for their gradients."""
    given, deep = (t.detach().clone().requires_grad_() for t in (prompts.input, prompts.deep))
    hooks = []
    for index, block in enumerate(_blocks_of(plain)):

        def add(module: nn.Module, args: Any, kwargs: Any, index: int = index) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = torch.cat([hidden[:, :_P] + deep[index], hidden[:, _P:]], dim=1)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        hooks.append(block.register_forward_pre_hook(add, with_kwargs=True))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    embeds = torch.cat([given.expand(len(ids), -1, -1), plain.get_input_embeddings()(ids)], dim=1)
    mask = torch.cat([mask.new_ones(len(ids), _P), mask], dim=1)
    try:
        logits = plain(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[:, _P:]
    finally:
        for hook in hooks:
            hook.remove()
    return logits, given, deep


def _classify(stack: contextlib.ExitStack, folder: str, options: dict[str, Any]) -> dict[str, float]:
    try:
        config = AutoConfig.from_pretrained(folder)
        config.num_labels = config.get_text_config().num_labels = 3
        config.get_text_config().pad_token_id = 0
        with quiet_transformers():
            plain = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32
            ).eval()
    except ValueError:  # the family has no such class
        return {}
    model = AutoDistributedModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, pad_token_id=0, **options
    )
    stack.callback(remote_blocks(model).close)
    head = next(child for name, child in plain.named_children() if name in ("score", "classifier"))
    head.load_state_dict(model.score.state_dict())
    batch = _batch()
    with torch.no_grad():
        return {"class scores": _error(model(**batch).logits, plain(**batch).logits)}


def _generate(stack: contextlib.ExitStack, folder: str, plain: Any, options: dict[str, Any]) -> list[str]:
    model = AutoDistributedModelForCausalLM.from_pretrained(folder, **options)
    stack.callback(remote_blocks(model).close)
    batch, wrong = _batch(), []
    ids, mask = batch["input_ids"], batch["attention_mask"]
    order = mask.argsort(dim=1, stable=True)
    greedy = {"max_new_tokens": _NEW, "min_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0}
    cases = {
        "one sample": (ids[:1], mask[:1]),
        "padding on the left": (ids.gather(1, order), mask.gather(1, order)),
    }
    for name, (given, padding) in cases.items():
        with torch.inference_mode():
            try:
                expected = plain.generate(given, attention_mask=padding, **greedy)
            except Exception:  # transformers itself cannot
                continue
            if not torch.equal(model.generate(given, attention_mask=padding, **greedy), expected):
                wrong.append(name)
    return wrong


def _blocks_of(plain: PreTrainedModel) -> nn.ModuleList:
    text = text_decoder_in(plain, plain.config.get_text_config())[1]
    return find_blocks(text).blocks(text)


def _spread(model: nn.Module) -> None:
    """Weights wider than a fresh model's, so that every block matters in the result."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
        elif "bias" in name:
            nn.init.normal_(parameter, std=0.05)


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY - 8, (_B, _S), generator=generator)
    lengths = torch.tensor([_S, 3, 6, 8])
    mask = (torch.arange(_S)[None] < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _error(found: Any, expected: Any) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def _short(error: BaseException) -> str:
    return first_line(error).replace("|", "/")[:300]


_HEAD = "| family | training | sessions | note |\n|---|---|---|---|"


def _row(row: Verdict) -> str:
    return f"| {row.family} | {row.training} | {row.sessions} | {row.note} |"


def document(rows: list[Verdict]) -> str:
    """The table as a page."""
    return ""


if __name__ == "__main__":
    main()

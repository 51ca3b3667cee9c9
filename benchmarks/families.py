"""Which families of decoders are served exactly, tried with a tiny random model of each.

    python -m benchmarks.families                                # all that this version of transformers knows
    python -m benchmarks.families --family llama --family gemma3
    python -m benchmarks.families --output oldest.json                              # how docs/families.md is made: once
    python -m benchmarks.families --page docs/families.md --beside oldest.json      # with the oldest versions, then so

Each model runs on two servers on this machine, with deep prompts and padded samples, and is compared with the family's
own class of transformers: logits, gradients of the prompts, class scores, and what `generate` writes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import functools
import json
import logging
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from benchmarks.options import Output
from benchmarks.tiny_configs import VOCABULARY, families, tiny_config
from petals_lightning.errors import PetalsLightningError, RemoteRequestError, UnsupportedModelError
from petals_lightning.hf import Checkpoint, find_blocks
from petals_lightning.hf.checkpoint import first_line
from petals_lightning.hf.compat import class_for, quiet_transformers
from petals_lightning.hf.decoder import text_decoder_in
from petals_lightning.hf.pruning import num_blocks
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    prompts_of,
)
from tools.testing.swarms import InProcessSwarm

_P, _B, _S, _NEW = 3, 4, 9, 6
_EXACT = 1e-5
_ROUNDING = 4  # times what the family's own class loses in float32, or by padding: where that is over 1e-5, the bound
EXACT, REFUSED, WRONG, FAILED, UNTRIED = "exact", "refused", "WRONG", "FAILED", "not tried"


@dataclass
class Verdict:
    """A row of the table."""

    family: str
    training: str
    sessions: str
    note: str = ""
    version: str = transformers.__version__

    def __str__(self) -> str:
        return f"| {self.family} | {self.training} | {self.sessions} | {self.note} |"


def main(
    family: Annotated[list[str] | None, typer.Option(help="model_type; several may be given. All by default.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the table there, as Markdown.")] = None,
    beside: Annotated[Path | None, typer.Option(help="What --output wrote with another version: a column.")] = None,
    show_errors: Annotated[bool, typer.Option(help="Print what goes wrong in full.")] = False,
    output: Output = None,
) -> None:
    """Prints a row for each family: whether training and sessions are exact, or why they are refused."""
    known = families()
    if unknown := sorted(set(family or ()) - known.keys()):
        raise typer.BadParameter(f"{unknown[0]}: no decoder that transformers {transformers.__version__} knows")
    print(_HEAD, flush=True)
    rows = []
    for name in family or known:
        rows.append(check(name, known[name], show_errors))
        print(rows[-1], flush=True)
    if page is not None:
        others = json.loads(beside.read_text()) if beside is not None else []
        page.write_text(document(rows, [Verdict(**row) for row in others]))
    if output is not None:
        output.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))


def check(family: str, auto_class: Any, show_errors: bool = False) -> Verdict:
    """Serves a tiny random model of a family, and uses it.

    Args:
        auto_class: that of transformers which makes it.
        show_errors: print the traceback of what goes wrong.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet_transformers(), _errors_only():
        warnings.simplefilter("ignore")
        try:
            auto_class = _save(auto_class, tiny_config(family), folder)
        except Exception as e:  # whatever the family's own code raises
            if show_errors:
                traceback.print_exc()
            return Verdict(family, UNTRIED, UNTRIED, f"no tiny model could be made: {type(e).__name__}: {_short(e)}")
        try:
            return _tried(family, auto_class, folder)
        except PetalsLightningError as e:
            if show_errors:
                traceback.print_exc()
            return Verdict(family, REFUSED, REFUSED, _short(e))
        except Exception as e:
            if show_errors:
                traceback.print_exc()
            return Verdict(family, FAILED, FAILED, f"{type(e).__name__}: {_short(e)}")


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Keeps our own warnings out of the table: each family's refusal is in its row."""
    ours = logging.getLogger("petals_lightning")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(level)


def _save(auto_class: Any, config: Any, folder: str) -> Any:
    """Saves a tiny model, and returns the class of transformers to compare with: some wrappers fail on texts alone."""
    torch.manual_seed(0)
    model = auto_class.from_config(config).eval()
    for name, parameter in model.named_parameters():  # wider than a fresh model, so that every block matters
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
        elif "bias" in name:
            nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    try:
        model(**_batch())
    except Exception:
        if auto_class is AutoModelForCausalLM or class_for(AutoModelForCausalLM, type(config)) is None:
            raise
        auto_class = AutoModelForCausalLM
        auto_class.from_pretrained(folder)(**_batch())
    return auto_class


def _tried(family: str, auto_class: Any, folder: str) -> Verdict:
    count = num_blocks(Checkpoint(folder).decoder_config)
    with InProcessSwarm(folder, [(0, 1), (1, count)], dtype="float32", throughput=1.0) as swarm:
        load = functools.partial(swarm.load, shared_peer=True, dtype=torch.float32)
        plain = auto_class.from_pretrained(folder, dtype=torch.float32).eval()
        errors, notes = _train(load, plain), []
        try:
            errors |= _classify(load, folder, plain)
        except UnsupportedModelError as e:
            notes.append("no class for sequence classification" if "has no class for" in str(e) else _short(e))
        wrong = [f"{name} off by {error:.0e}" for name, error in errors.items() if not error < _EXACT]
        notes += wrong
        try:
            cases = _generate(load, plain)
            sessions = WRONG if cases else EXACT
            notes += [f"generate differs: {case}" for case in cases]
        except RemoteRequestError:
            sessions = REFUSED
            notes.append("keeps more than keys and values, so it does not generate")
        return Verdict(family, WRONG if wrong else EXACT, sessions, "; ".join(notes))


def _train(load: Any, plain: Any) -> dict[str, float]:
    model = load(AutoDistributedModelForCausalLM, tuning_mode="deep_ptune", pre_seq_len=_P)
    prompts = prompts_of(model)
    with torch.no_grad():
        prompts.input.normal_(0, 0.3)
        prompts.deep.normal_(0, 0.3)
    batch = _batch()
    real = batch["attention_mask"].bool()
    logits = model(**batch).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)) * real[..., None]
    (logits * weights).sum().backward()
    found = {"logits": logits[real], "prompt gradients": prompts.input.grad, "deep gradients": prompts.deep.grad}

    def expected(plain: PreTrainedModel, rows: slice = slice(None), length: int = _S) -> dict[str, torch.Tensor]:
        part = {name: tensor[rows, :length] for name, tensor in batch.items()}
        logits, given, deep = _plain_logits(plain, prompts, part)
        (logits * weights[rows, :length]).sum().backward()
        assert given.grad is not None
        assert deep.grad is not None
        return {"logits": logits[real[rows, :length]], "prompt gradients": given.grad, "deep gradients": deep.grad}

    def without_padding() -> dict[str, torch.Tensor]:
        parts = [expected(plain, slice(row, row + 1), length) for row, length in enumerate(real.sum(1).tolist())]
        logits = torch.cat([part["logits"] for part in parts])
        return {"logits": logits} | {name: sum(part[name] for part in parts) for name in found if name != "logits"}  # type: ignore

    in_float32 = expected(plain)
    errors = {name: _error(found[name], in_float32[name]) for name in found}
    if max(errors.values()) < _EXACT:
        return errors
    try:
        better = expected(copy.deepcopy(plain).double())
    except RuntimeError:  # experts are multiplied in float32 and less only
        better = without_padding()
    lost = {name: _error(in_float32[name], better[name]) for name in found}
    return {
        name: 0.0 if _error(found[name], better[name]) < _ROUNDING * lost[name] else error
        for name, error in errors.items()
    }


def _plain_logits(
    plain: PreTrainedModel, prompts: Any, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [B, S, V] of the family's own class with prompts concatenated, and the leaves for their gradients."""
    dtype = next(plain.parameters()).dtype
    given, deep = (t.detach().to(dtype, copy=True).requires_grad_() for t in (prompts.input, prompts.deep))
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


def _classify(load: Any, folder: str, plain: PreTrainedModel) -> dict[str, float]:
    padding = {"pad_token_id": 0} if hasattr(Checkpoint(folder).decoder_config, "pad_token_id") else {}
    model = load(AutoDistributedModelForSequenceClassification, **padding, num_labels=3)
    config, batch = AutoConfig.from_pretrained(folder), _batch()
    text = config.get_text_config()
    text.num_labels, text.pad_token_id = 3, 0
    with torch.no_grad():
        found = model(**batch).logits
        if text is config:
            scorer = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32
            ).eval()
            head: Any = next(child for name, child in scorer.named_children() if name in ("score", "classifier"))
            head.load_state_dict(model.score.state_dict())
            expected = scorer(**batch).logits
        else:  # the wrapper has none: its decoder, and the scores of the last token
            decoder = text_decoder_in(plain, text)[1]
            last = batch["attention_mask"].sum(1) - 1
            expected = model.score(decoder(**batch).last_hidden_state[torch.arange(_B), last])
    return {"class scores": _error(found, expected)}


def _generate(load: Any, plain: Any) -> list[str]:
    model = load(AutoDistributedModelForCausalLM)
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
            expected = []
            for use_cache in (False, True):  # in some families transformers' own cache gives other tokens than none
                with contextlib.suppress(Exception):  # or cannot be used, or not be left out
                    expected.append(plain.generate(given, attention_mask=padding, use_cache=use_cache, **greedy))
            if not expected and padding.all():
                expected.append(_greedy(plain, given))
            tokens = model.generate(given, attention_mask=padding, use_cache=True, **greedy)
            if expected and not any(torch.equal(tokens, other) for other in expected):
                wrong.append(name)
    return wrong


def _blocks_of(plain: PreTrainedModel) -> nn.ModuleList:
    text = text_decoder_in(plain, plain.config.get_text_config())[1]
    return find_blocks(text).blocks(text)


@torch.no_grad()
def _greedy(plain: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What `generate` would write, where transformers' own does not take such a model's config."""
    for _ in range(_NEW):
        ids = torch.cat([ids, plain(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY - 8, (_B, _S), generator=generator)
    lengths = torch.tensor([_S, 3, 6, 8])
    mask = (torch.arange(_S)[None] < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _error(found: Any, expected: Any) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def _short(error: BaseException) -> str:
    words = first_line(error).split(". Use a version of")[0].replace("|", "/")[:300]
    return words.replace(tempfile.gettempdir() + "/", "")


_HEAD = "| family | training | sessions | note |\n|---|---|---|---|"


def document(rows: list[Verdict], others: list[Verdict]) -> str:
    """The table as a page, with a column of what another version of transformers gave."""
    counts = {word: sum(row.training == word for row in rows) for word in (EXACT, REFUSED, WRONG, FAILED, UNTRIED)}
    sessions = sum(row.sessions == EXACT for row in rows)
    failed = counts[WRONG] + counts[FAILED]
    made = f"{datetime.date.today()} with transformers {transformers.__version__} and torch {torch.__version__}"
    return f"""# Families of decoders

A tiny random model of each family that transformers lists under `AutoModelForCausalLM` or `AutoModelForImageTextToText`
runs on two servers and is compared with the family's own class. *Training* is exact if logits, class scores and the
gradients of deep prompts are within {_EXACT:.0e} of it, with padded samples. (A few families lose more than that by
themselves, in float32 or by padding: there both are compared with float64, or with samples one by one.) *Sessions*
are exact if greedy generation writes the same tokens, also with padding on the left. Of wrappers (Gemma 3, Qwen2-VL,
LLaVA, …) the text decoder is served. What is refused is refused when a server starts or a client loads, with the words
in the note.

Of {len(rows)} families {counts[EXACT]} train exactly, and {sessions} of them have exact sessions too.
{counts[REFUSED]} are refused. {counts[UNTRIED]} could not be tried: of them no tiny model
could be made that reads texts alone.
{failed or "None"} of them gave something else.

Made by `python -m benchmarks.families --page docs/families.md` on {made.split("+")[0]}.
Run it with the versions that you have.

{_table(rows, others)}"""


def _table(rows: list[Verdict], others: list[Verdict]) -> str:
    if not others:
        return "\n".join([_HEAD, *map(str, rows)]) + "\n"
    then = {row.family: row for row in others}
    lines = [f"| family | training | sessions | with {others[0].version} | note |", "|---|---|---|---|---|"]
    for row in rows:
        was = then.get(row.family)
        if was is None:
            beside = "not in it"
        elif (was.training, was.sessions) == (row.training, row.sessions):
            beside = "the same"
        else:
            beside = was.training if was.training == was.sessions else f"{was.training}, {was.sessions}"
        lines.append(f"| {row.family} | {row.training} | {row.sessions} | {beside} | {row.note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)

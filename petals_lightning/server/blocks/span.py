"""The blocks that a server holds, and the arithmetic on them. No I/O, no messages.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, n blocks of a (sub-)span, N rows that are read.

The prefix runs once, with batch 1: in causal attention its hidden states do not depend on the samples behind it. Its
keys and values are then shared by the batch, so each sample costs S positions instead of P + S, and outputs and
gradients are those of the concatenated batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from petals_lightning.errors import UnsupportedModelError
from petals_lightning.hf.attention import sliding_window
from petals_lightning.hf.compat import cache_name
from petals_lightning.hf.rotary import rotary_limit
from petals_lightning.hf.skeleton import BlockLayout, sliced_config
from petals_lightning.protocol.tensors import is_same
from petals_lightning.server.blocks.cpu_decoding import threads_for
from petals_lightning.server.blocks.kv_cache import SpanCache
from petals_lightning.server.blocks.prefix_cache import KeysTaken, PrefixCache
from petals_lightning.server.blocks.transfers import Transfers


@dataclass
class SpanInputs:
    """What enters blocks [start, end). The span moves to its device what it needs there.

    Attributes:
        hidden: [B, S, H].
        prefix: [P, H] hidden states of the prefix, or None without prompts.
        deep: [n, P, H] prompts added before each block, or None. Without a prefix they are added to the first P
            positions of `hidden`, and may be [n, B, P, H].
        rows: [N] indices into the B·S positions whose outputs are wanted, on the host, or None for all.
    """

    start: int
    end: int
    hidden: torch.Tensor
    prefix: torch.Tensor | None = None
    deep: torch.Tensor | None = None
    rows: torch.Tensor | None = None


@dataclass(eq=False)
class PrefixRun:
    """The prefix's pass through blocks, whose keys and values the micro-batches of a step may share.

    Attributes:
        inputs: what it was run for.
        leaves: `prefix`, and `deep` if there is one: what gradients are taken for, where there is a graph.
        output: [P, H].
    """

    inputs: SpanInputs
    leaves: dict[str, torch.Tensor]
    cache: PrefixCache
    output: torch.Tensor

    def fits(self, other: SpanInputs) -> bool:
        """Whether other inputs would give the same."""
        own = self.inputs
        same_prompts = is_same(own.prefix, other.prefix) and is_same(own.deep, other.deep)
        return (own.start, own.end) == (other.start, other.end) and same_prompts


@dataclass
class SpanGraph:
    """A forward whose autograd graph is kept: `leaves` are the inputs that gradients are taken for.

    With a `prefix_run` the graph ends at the prefix's keys and values, which are leaves of it (`keys_and_values`). From
    there gradients go through the graph of that run, which other micro-batches may share.
    """

    inputs: SpanInputs
    outputs: list[torch.Tensor]
    leaves: dict[str, torch.Tensor]
    num_bytes: int = 0
    prefix_run: PrefixRun | None = None
    keys_and_values: PrefixCache | None = None


@dataclass
class _Call:
    """What the hooks on blocks need to know of the running pass."""

    start: int
    end: int
    hidden: torch.Tensor
    deep: torch.Tensor | None  # for the first positions of `hidden`
    output: torch.Tensor | None = None


class BlockSpan:
    """Blocks [start, end) of a model, pruned from its own class.

    Args:
        model: the pruned model (`hf.load_pruned`), on its device, frozen, in eval mode.
        layout: where its blocks are.
        start: number of its first block in the full model.

    Attributes:
        share_prefix: whether the prefix may run once for the batch; `verify_shared_prefix` finds out.
        skips_unread: whether the last block may leave out what is not read; `verify_skipping` finds out.
        has_sessions: whether keys and values are all that the blocks keep; `verify_sessions` finds out.
        joins_steps: whether sessions of different lengths may run as one batch; `verify_joint_steps` finds out.
    """

    def __init__(self, model: PreTrainedModel, layout: BlockLayout, start: int):
        self.model, self.layout, self.start = model, layout, start
        self.blocks = list(layout.blocks(model))
        self.end = start + len(self.blocks)
        self.share_prefix = self.skips_unread = self.joins_steps = self.has_sessions = True
        parameter = next(model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        self.transfers = Transfers(self.device)
        self.hidden_size = model.config.get_text_config().hidden_size
        self._config = model.config
        self.rotary_limit, self._window = rotary_limit(model.config), sliding_window(model.config)
        self._cache_name = cache_name(model)
        self._takes_position_ids = "position_ids" in inspect.signature(model.forward).parameters
        self._weight_bytes = [sum(p.nbytes for p in block.parameters()) for block in self.blocks]
        self._views: dict[tuple[int, int], tuple[nn.ModuleList, Any]] = {}
        self._call: _Call | None = None
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(self._before_block(start + index))
            block.register_forward_hook(self._after_block(start + index))

    def weight_bytes(self, start: int, end: int) -> int:
        """What the weights of blocks [start, end) take."""
        return sum(self._weight_bytes[start - self.start : end - self.start])

    def forward(
        self, inputs: SpanInputs, prefix_cache: PrefixCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs [B, S, H] (or [N, H] with `rows`), and the prefix's [P, H] if there is one and it is run here.

        Runs under whatever gradient mode the caller set. With a `prefix_cache` the prefix has been run before.
        """
        hidden, prefix = self._moved(inputs.hidden), inputs.prefix
        prefix_out = None
        if prefix is None:
            out = self._run(_Call(inputs.start, inputs.end, hidden, self._deep(inputs)), None)
        elif self.shares_prefix(len(prefix), hidden.shape[1]):
            if prefix_cache is None:
                run = self.run_prefix(inputs, {})
                prefix_cache, prefix_out = run.cache, run.output
            if self.skips_unread and self._reads_one_each(inputs, len(prefix)):
                return self._run_skipping_unread(inputs, hidden, prefix_cache), prefix_out
            out = self._run(_Call(inputs.start, inputs.end, hidden, None), prefix_cache)
        else:
            count = len(prefix)
            both = torch.cat([self._moved(prefix).expand(len(hidden), -1, -1), hidden], dim=1)
            both = self._run(_Call(inputs.start, inputs.end, both, self._deep(inputs)), None)
            # Every sample carries the same prefix, so any of them gives its output; the mean shares its gradient.
            prefix_out, out = both[:, :count].mean(0), both[:, count:]
        if inputs.rows is not None:
            out = out.reshape(-1, out.shape[-1])[self.transfers.to_device(inputs.rows)]
        return out, prefix_out

    def run_prefix(self, inputs: SpanInputs, leaves: dict[str, torch.Tensor]) -> PrefixRun:
        """Runs the prefix of `inputs`, or the `leaves` in its place, with batch 1."""
        tracked = _with_leaves(inputs, leaves)
        assert tracked.prefix is not None
        cache = PrefixCache(len(self.blocks), inputs.start - self.start)
        call = _Call(inputs.start, inputs.end, self._moved(tracked.prefix)[None], self._deep(tracked))
        return PrefixRun(inputs, leaves, cache, self._run(call, cache)[0])

    def _reads_one_each(self, inputs: SpanInputs, prefix: int) -> bool:
        """Whether one position of each sample is read, as a classifier does, and padding behind it counts in no window.

        Args:
            prefix: positions in front of each sample.
        """
        (batch, tokens, _), rows = inputs.hidden.shape, inputs.rows
        if rows is None or len(rows) != batch or (self._window is not None and prefix + tokens > self._window):
            return False
        return torch.equal(rows // tokens, torch.arange(batch))

    def _run_skipping_unread(self, inputs: SpanInputs, hidden: torch.Tensor, cache: PrefixCache) -> torch.Tensor:
        """Outputs [B, H] of the one position of each sample that is read.

        What the others give it in the last block are their keys and values. So that block runs on all positions only
        until it hands those to its cache, and then on the positions that are read.

        Args:
            hidden: [B, S, H], that of the inputs in the blocks' dtype.
            cache: of the prefix, which has run.
        """
        assert inputs.rows is not None
        (batch, tokens, _), last = hidden.shape, inputs.end - 1
        if last > inputs.start:
            hidden = self._run(_Call(inputs.start, last, hidden, None), cache)
        taken = cache.taking(last - self.start)
        with suppress(KeysTaken):
            self._run(_Call(last, inputs.end, hidden, None), taken)
            raise NotImplementedError("the block keeps no keys and values")
        at, held = self.transfers.to_device(inputs.rows % tokens), taken.get_seq_length() + 1
        positions = (held - tokens + at)[:, None]
        mask = torch.arange(held, device=at.device) <= positions
        read = hidden[torch.arange(batch, device=at.device), at][:, None]
        return self.step(last, inputs.end, read, taken, attention_mask=mask, position_ids=positions)[:, 0]

    def _deep(self, inputs: SpanInputs) -> torch.Tensor | None:
        return self._moved(inputs.deep) if inputs.deep is not None else None

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.transfers.to_device(tensor).to(self.dtype)

    def _leaves(self, inputs: SpanInputs, *names: str) -> dict[str, torch.Tensor]:
        given = {name: tensor for name in names if (tensor := getattr(inputs, name)) is not None}
        return {name: self.transfers.to_device(tensor).detach().requires_grad_() for name, tensor in given.items()}

    def shares_prefix(self, prefix: int, tokens: int) -> bool:
        """Whether a prefix of so many positions runs once for samples of so many tokens.

        Not if it would be turned by other rotary factors than the samples behind it.

        Raises:
            ProtocolError: the model cannot be served at this length.
        """
        limit = self.rotary_limit
        return not (limit is not None and limit.is_beyond(prefix + tokens)) and self.share_prefix

    def forward_with_graph(
        self, inputs: SpanInputs, *, input_grad: bool, prefix_run: PrefixRun | None = None
    ) -> SpanGraph:
        """As `forward`, keeping what a backward needs.

        Args:
            input_grad: whether `hidden` needs a gradient.
            prefix_run: of an earlier call; used if it fits.
        """
        leaves = self._leaves(inputs, "hidden") if input_grad else {}
        with torch.enable_grad():
            if inputs.prefix is None or not self.shares_prefix(len(inputs.prefix), inputs.hidden.shape[1]):
                leaves |= self._leaves(inputs, "prefix", "deep")
                out, prefix_out = self.forward(_with_leaves(inputs, leaves))
                return SpanGraph(inputs, [out] if prefix_out is None else [out, prefix_out], leaves)
            if prefix_run is None or not prefix_run.fits(inputs):
                prefix_run = self.run_prefix(inputs, self._leaves(inputs, "prefix", "deep"))
            leaves |= prefix_run.leaves
            cut = prefix_run.cache.detached()
            out, _ = self.forward(_with_leaves(inputs, leaves), cut)
        return SpanGraph(inputs, [out, prefix_run.output], leaves, prefix_run=prefix_run, keys_and_values=cut)

    def backward(
        self, graph: SpanGraph, grad: torch.Tensor, grad_prefix: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Gradients by leaf name, shaped like the leaves: prompts' are summed over the batch.

        Args:
            graph: consumed by the call.
            grad: like the forward's output.
            grad_prefix: [P, H], or None where nothing behind this span reads the prefix.
        """
        run, leaves, to_device = graph.prefix_run, graph.leaves, self.transfers.to_device
        pairs, of_prefix = [(graph.outputs[0], to_device(grad))], []
        if len(graph.outputs) > 1 and grad_prefix is not None:
            of_prefix = [(graph.outputs[1], to_device(grad_prefix))]
        if run is None:
            grads = _gradients([*pairs, *of_prefix], leaves)
        else:
            assert graph.keys_and_values is not None
            ends = {name: leaf for name, leaf in leaves.items() if name == "hidden"}
            found = _gradients(pairs, ends | dict(enumerate(graph.keys_and_values.tensors())))
            grads = {name: grad for name, grad in found.items() if name == "hidden"}
            of_prefix += [(made, found[i]) for i, made in enumerate(run.cache.tensors()) if i in found]
            grads |= _gradients(of_prefix, run.leaves, retain_graph=True)  # others may go the same way
        return {name: grads[name] if name in grads else torch.zeros_like(leaf) for name, leaf in leaves.items()}

    def step(
        self,
        start: int,
        end: int,
        hidden: torch.Tensor,
        cache: SpanCache,
        *,
        deep: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs new positions [B, n, H] behind those in `cache`, which takes them in.

        Args:
            deep: [blocks, P, H] or [blocks, B, P, H] added before each block to the first P of the new positions.
            attention_mask: [B, positions in the cache and new], 0 where they are padding; None: none is.
            position_ids: [B, n]; None counts on from the cache. (Families without them take all from the mask.)
        """
        call = _Call(start, end, hidden.to(self.dtype), deep.to(self.dtype) if deep is not None else None)
        padding: dict[str, torch.Tensor] = {}
        if attention_mask is not None:
            padding["attention_mask"] = attention_mask.long()
        if position_ids is not None and self._takes_position_ids:
            padding["position_ids"] = position_ids
        with threads_for(call.hidden, cache.get_seq_length()):
            return self._run(call, cache, **padding)

    def _run(self, call: _Call, cache: SpanCache | None, **padding: torch.Tensor) -> torch.Tensor:
        with self._narrowed(call.start, call.end):
            self._call = call
            try:
                cached = {self._cache_name: cache, "use_cache": cache is not None}
                self.model(inputs_embeds=call.hidden, **cached, **padding)
            finally:
                self._call = None
        if call.output is None:
            raise UnsupportedModelError(f"{type(self.model).__name__} left out its last block")
        return call.output

    @contextmanager
    def _narrowed(self, start: int, end: int) -> Iterator[None]:
        """The model looks as if it had only blocks [start, end)."""
        if (start, end) == (self.start, self.end):
            yield
            return
        if (start, end) not in self._views:
            first, last = start - self.start, end - self.start
            self._views[start, end] = nn.ModuleList(self.blocks[first:last]), sliced_config(self._config, first, last)
        blocks, config = self._views[start, end]
        owner, all_blocks, full_config = self.layout.owner(self.model), self.layout.blocks(self.model), self._config
        self.layout.set_blocks(self.model, blocks)
        owner.config = config
        try:
            yield
        finally:
            self.layout.set_blocks(self.model, all_blocks)
            owner.config = full_config

    def _before_block(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            call = self._call
            assert call is not None
            # The first block takes what came over the wire, not what the owner made of it (scaling, layer norms).
            hidden = call.hidden if number == call.start else args[0]
            if call.deep is not None:
                deep = call.deep[number - call.start]
                hidden = hidden + nn.functional.pad(deep, (0, 0, 0, hidden.shape[1] - deep.shape[-2]))
            return (hidden, *args[1:])

        return hook

    def _after_block(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call = self._call
            assert call is not None
            if number == call.end - 1:
                call.output = output[0] if isinstance(output, tuple) else output

        return hook


def _with_leaves(inputs: SpanInputs, leaves: dict[str, torch.Tensor]) -> SpanInputs:
    return SpanInputs(**{**vars(inputs), **leaves})


def _gradients(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], inputs: Mapping[Any, torch.Tensor], retain_graph: bool = False
) -> dict[Any, torch.Tensor]:
    """Gradients of `inputs`, by name, where outputs with these gradients depend on them."""
    pairs = [(out, grad.to(out)) for out, grad in pairs if out.requires_grad]
    if not pairs or not inputs:
        return {}
    found = torch.autograd.grad(
        [out for out, _ in pairs], list(inputs.values()), [grad for _, grad in pairs],
        allow_unused=True, retain_graph=retain_graph,
    )  # fmt: skip
    return {name: grad for name, grad in zip(inputs, found, strict=True) if grad is not None}

"""The blocks that a server holds: forward, backward and session steps on tensors.

Shapes: see the legend in `petals_lightning.protocol`; n is the number of blocks that a call runs.

The prefix runs once, with batch 1: with causal attention its hidden states do not depend on the samples after it. The
batch then shares its keys and values. So each sample costs S positions instead of P + S, and outputs and gradients are
those of the concatenated batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from petals_lightning.errors import ProtocolError
from petals_lightning.hf.context_limits import rotary_limit, sliding_window
from petals_lightning.hf.linears import linear_shape
from petals_lightning.hf.pruning import BlockLayout
from petals_lightning.hf.quantization import dtype_and_device, quant_type_of, weight_bytes
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.tensors import is_same
from petals_lightning.server.blocks.block_runner import BlockPass, BlockRunner
from petals_lightning.server.blocks.cpu_decoding import threads_for
from petals_lightning.server.blocks.kv_cache import SpanCache
from petals_lightning.server.blocks.prefix_cache import KeysTaken, PrefixCache, shapes_of
from petals_lightning.server.blocks.transfers import Transfers


@dataclass
class SpanInputs:
    """The inputs of blocks [start, end). The span moves them to its device.

    Attributes:
        hidden: [B, S, H].
        prefix: [P, H] hidden states of the prefix, or None without prompts.
        adapter: of these blocks, or None. Without a prefix, deep prompts are for the first P positions of `hidden`.
        rows: [N] indices into the B·S positions whose outputs to return, on the host; None returns all.
    """

    start: int
    end: int
    hidden: torch.Tensor
    prefix: torch.Tensor | None = None
    adapter: Adapter | None = None
    rows: torch.Tensor | None = None


@dataclass(eq=False)
class PrefixRun:
    """The prefix's pass through blocks. The micro-batches of a step may share its keys and values.

    Attributes:
        inputs: of the request that it was run for.
        leaves: with a graph, the tensors that gradients are computed for: `prefix`, and the adapter's.
        output: [P, H].
    """

    inputs: SpanInputs
    leaves: dict[str, torch.Tensor]
    cache: PrefixCache
    output: torch.Tensor

    def fits(self, other: SpanInputs) -> bool:
        """Whether the prefix of other inputs would give the same result."""
        own = self.inputs
        same_adapter = own.adapter.is_same(other.adapter) if own.adapter is not None else other.adapter is None
        same_blocks = (own.start, own.end) == (other.start, other.end)
        return same_blocks and is_same(own.prefix, other.prefix) and same_adapter


@dataclass
class SpanGraph:
    """A forward whose autograd graph is kept. `leaves` are the inputs that gradients are computed for.

    With a `prefix_run` the graph ends at the prefix's keys and values, which are its leaves too (`keys_and_values`).
    From there gradients go through the graph of that run, which other micro-batches may share.
    """

    inputs: SpanInputs
    outputs: list[torch.Tensor]
    leaves: dict[str, torch.Tensor]
    num_bytes: int = 0
    prefix_run: PrefixRun | None = None
    keys_and_values: PrefixCache | None = None


class BlockSpan:
    """Blocks [start, end) of a model, pruned from its own class.

    Args:
        model: the pruned model (`hf.load_pruned`), on its device, frozen, in eval mode.
        layout: where its blocks are.
        start: number of its first block in the full model.

    Attributes:
        dtype, device: of the passes.
        devices: of each block.
        quant_type: how the weights of the linears are kept.
        share_prefix: whether the prefix may run once for the batch (tested by `verify_shared_prefix`).
        skips_unread: whether the last block may skip positions that are not read (`verify_skipping`).
        has_sessions: whether the blocks keep nothing but keys and values (`verify_sessions`).
        past_shapes: heads, size of a key and size of a value by block, where keys and values may be given in place of a
            prefix (`measure_past_shapes`); empty if the family keeps more than these.
        batches_sessions: whether sessions of different lengths may run as one batch (`verify_batched_decoding`).
    """

    def __init__(self, model: PreTrainedModel, layout: BlockLayout, start: int):
        self.model, self.layout, self.start = model, layout, start
        self.blocks = list(layout.blocks(model))
        self.end = start + len(self.blocks)
        self.share_prefix = self.skips_unread = self.batches_sessions = self.has_sessions = True
        self.past_shapes: dict[int, tuple[int, int, int]] = {}
        self.dtype, self.device = dtype_and_device(model)
        self.devices = [dtype_and_device(block)[1] for block in self.blocks]
        self.quant_type = quant_type_of(model)
        self.transfers = Transfers(self.device)
        self.hidden_size = model.config.get_text_config().hidden_size
        self.rotary_limit, self._window = rotary_limit(model.config), sliding_window(model.config)
        self._weight_bytes = [weight_bytes(block) for block in self.blocks]
        self._runner = BlockRunner(model, layout, start)
        self._copies: WeakKeyDictionary[Adapter, Adapter] = WeakKeyDictionary()  # on the device

    def weight_bytes(self, start: int, end: int) -> int:
        """Bytes of the weights of blocks [start, end)."""
        return sum(self._weight_bytes[start - self.start : end - self.start])

    def forward(
        self, inputs: SpanInputs, prefix_cache: PrefixCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns outputs [B, S, H] (or [N, H] with `rows`), and the prefix's [P, H] if the call runs a prefix.

        Runs in the caller's gradient mode. With a `prefix_cache` the prefix was run before.
        """
        hidden, prefix = self._moved(inputs.hidden), inputs.prefix
        prefix_out = None
        if prefix is None and inputs.adapter is not None and inputs.adapter.past:
            prefix_cache = self._past_cache(inputs)
            if self._may_skip(inputs, inputs.adapter.past_length):
                return self._run_skipping_unread(inputs, hidden, prefix_cache), None
            out = self._runner.run(BlockPass(inputs.start, inputs.end, hidden, self._lora(inputs)), prefix_cache)
        elif prefix is None:
            is_plain = inputs.adapter is None or inputs.adapter.deep is None  # deep prompts are for certain positions
            if is_plain and self._may_skip(inputs, 0) and self.shares_prefix(0, hidden.shape[1]):
                return self._run_skipping_unread(inputs, hidden, None), None
            out = self._runner.run(BlockPass(inputs.start, inputs.end, hidden, self._placed(inputs.adapter)), None)
        elif self.shares_prefix(len(prefix), hidden.shape[1]):
            if prefix_cache is None:
                run = self.run_prefix(inputs, {})
                prefix_cache, prefix_out = run.cache, run.output
            if self._may_skip(inputs, len(prefix)):
                return self._run_skipping_unread(inputs, hidden, prefix_cache), prefix_out
            out = self._runner.run(BlockPass(inputs.start, inputs.end, hidden, self._lora(inputs)), prefix_cache)
        else:
            count = len(prefix)
            both = torch.cat([self._moved(prefix).expand(len(hidden), -1, -1), hidden], dim=1)
            both = self._runner.run(BlockPass(inputs.start, inputs.end, both, self._placed(inputs.adapter)), None)
            # Every sample carries the same prefix, so each has its output. The mean splits its gradient among them.
            prefix_out, out = both[:, :count].mean(0), both[:, count:]
        if inputs.rows is not None:
            out = out.reshape(-1, out.shape[-1])[self.transfers.to_device(inputs.rows)]
        return out, prefix_out

    def run_prefix(self, inputs: SpanInputs, leaves: dict[str, torch.Tensor]) -> PrefixRun:
        """Runs the prefix of `inputs` with batch 1; `leaves` replace the inputs of the same names."""
        tracked = _with_leaves(inputs, leaves)
        assert tracked.prefix is not None
        cache = PrefixCache(len(self.blocks), inputs.start - self.start)
        adapter = self._placed(tracked.adapter)
        call = BlockPass(inputs.start, inputs.end, self._moved(tracked.prefix)[None], adapter)
        return PrefixRun(inputs, leaves, cache, self._runner.run(call, cache)[0])

    def _past_cache(self, inputs: SpanInputs) -> PrefixCache:
        """A cache with the adapter's keys and values."""
        adapter, cache = self._placed(inputs.adapter), PrefixCache(len(self.blocks), inputs.start - self.start)
        assert adapter is not None
        return cache.fill(adapter.past, self.dtype, self.devices)

    def prefix_past(self, inputs: SpanInputs) -> dict[str, torch.Tensor]:
        """Keys and values of the prefix of `inputs` in its blocks, named as an adapter's.

        Raises:
            ProtocolError: the family keeps more than these.
        """
        self._check_takes_past()
        past = self.run_prefix(inputs, {}).cache.past(self.start)
        return Adapter(inputs.start, inputs.end, past=past).tensors()

    def _check_takes_past(self) -> None:
        if not self.past_shapes:
            raise ProtocolError(
                f"{type(self.model).__name__} ({self.model.config.model_type}) keeps more than keys and values of what "
                "precedes a sample, so that they cannot be given or taken: use tuning_mode='deep_ptune'"
            )

    def _may_skip(self, inputs: SpanInputs, prefix: int) -> bool:
        return self.skips_unread and self._reads_one_each(inputs, prefix)

    def _reads_one_each(self, inputs: SpanInputs, prefix: int) -> bool:
        """Whether one position of each sample is read, as by a classifier, and no sliding window is in effect.

        (In a window, padding after the position would count.)

        Args:
            prefix: positions before each sample.
        """
        (batch, tokens, _), rows = inputs.hidden.shape, inputs.rows
        if rows is None or len(rows) != batch or (self._window is not None and prefix + tokens > self._window):
            return False
        return torch.equal(rows // tokens, torch.arange(batch))

    def _run_skipping_unread(self, inputs: SpanInputs, hidden: torch.Tensor, cache: PrefixCache | None) -> torch.Tensor:
        """Outputs [B, H] of the one position of each sample that is read.

        In the last block it needs only the keys and values of the others. So that block runs on all positions until it
        hands these to its cache, which ends the pass, and then on the positions that are read.

        Args:
            hidden: [B, S, H], the inputs' in the blocks' dtype.
            cache: of the prefix, which has run; None: there is no prefix.
        """
        assert inputs.rows is not None
        (batch, tokens, _), last, lora = hidden.shape, inputs.end - 1, self._lora(inputs)
        if last > inputs.start:
            hidden = self._runner.run(BlockPass(inputs.start, last, hidden, lora), cache)
        of_last = cache if cache is not None else PrefixCache(len(self.blocks), last - self.start)
        taken = of_last.taking(last - self.start)
        with suppress(KeysTaken):
            self._runner.run(BlockPass(last, inputs.end, hidden, lora), taken)
            raise NotImplementedError("the block keeps no keys and values")
        at, held = self.transfers.to_device(inputs.rows % tokens), taken.get_seq_length() + 1
        positions = (held - tokens + at)[:, None]
        mask = torch.arange(held, device=at.device) <= positions
        read = hidden[torch.arange(batch, device=at.device), at][:, None]
        out = self.step(last, inputs.end, read, taken, adapter=lora, attention_mask=mask, position_ids=positions)
        return out[:, 0]

    def check_adapter(self, adapter: Adapter) -> None:
        """Raises ProtocolError unless the adapter's tensors fit hosted blocks and linears that these have."""
        if not self.start <= adapter.start < adapter.end <= self.end:
            raise ProtocolError(
                f"an adapter of blocks {adapter.start}:{adapter.end}, this server has {self.start}:{self.end}"
            )
        if adapter.deep is not None and adapter.deep.shape[-1] != self.hidden_size:
            raise ProtocolError(
                f"deep prompts are {list(adapter.deep.shape)}, must be of hidden size {self.hidden_size}"
            )
        if adapter.past:
            self._check_takes_past()
            for block, shape in zip(range(adapter.start, adapter.end), shapes_of(adapter.past), strict=True):
                if shape != (held := self.past_shapes[block]):
                    raise ProtocolError(
                        f"keys and values of block {block} have heads and sizes {shape}, here they are {held}"
                    )
        for factors in adapter.all_lora:
            for block in factors.blocks:
                linears = self._runner.linears(block)
                if factors.target not in linears:
                    raise ProtocolError(
                        f"block {block} has no linear {factors.target!r:.60}; its linears are {', '.join(linears)}"
                    )
                given, own = (factors.a.shape[2], factors.b.shape[1]), linear_shape(linears[factors.target])
                if given != own:
                    raise ProtocolError(
                        f"LoRA of {factors.target!r} has inputs and outputs {given}, in block {block} they are {own}"
                    )

    def _placed(self, adapter: Adapter | None) -> Adapter | None:
        """The adapter on the span's device. What is sent once is copied there once."""
        if adapter is None or all(tensor.device == self.device for tensor in adapter.all_tensors().values()):
            return adapter
        if adapter not in self._copies:
            self._copies[adapter] = adapter.map(self.transfers.to_device)
        return self._copies[adapter]

    def _lora(self, inputs: SpanInputs) -> Adapter | None:
        """The part of an adapter that acts on samples whose prefix runs by itself."""
        adapter = self._placed(inputs.adapter)
        return adapter.lora_only if adapter is not None else None

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.transfers.to_device(tensor).to(self.dtype)

    def _leaves(self, inputs: SpanInputs) -> dict[str, torch.Tensor]:
        """Prefix and adapter on the device, as leaves of a new graph."""
        adapter = self._placed(inputs.adapter)
        given = {} if inputs.prefix is None else {"prefix": inputs.prefix}
        given |= adapter.tensors() if adapter is not None else {}
        return {name: self._leaf(tensor) for name, tensor in given.items()}

    def _leaf(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.transfers.to_device(tensor).detach().requires_grad_()

    def shares_prefix(self, prefix: int, tokens: int) -> bool:
        """Whether a prefix of this many positions runs once for samples of this many tokens.

        It does not if the samples need other rotary factors than the prefix alone would.

        Raises:
            ProtocolError: the model cannot be served at this length.
        """
        limit = self.rotary_limit
        return not (limit is not None and limit.uses_long_factors(prefix + tokens)) and self.share_prefix

    def forward_with_graph(
        self, inputs: SpanInputs, *, input_grad: bool, prefix_run: PrefixRun | None = None
    ) -> SpanGraph:
        """Runs `forward` and keeps the autograd graph.

        Args:
            input_grad: whether `hidden` needs a gradient.
            prefix_run: of an earlier call; reused if its inputs are the same.
        """
        leaves = {"hidden": self._leaf(inputs.hidden)} if input_grad else {}
        with torch.enable_grad():
            if inputs.prefix is None or not self.shares_prefix(len(inputs.prefix), inputs.hidden.shape[1]):
                leaves |= self._leaves(inputs)
                out, prefix_out = self.forward(_with_leaves(inputs, leaves))
                return SpanGraph(inputs, [out] if prefix_out is None else [out, prefix_out], leaves)
            if prefix_run is None or not prefix_run.fits(inputs):
                prefix_run = self.run_prefix(inputs, self._leaves(inputs))
            leaves |= prefix_run.leaves
            cut = prefix_run.cache.detached()
            out, _ = self.forward(_with_leaves(inputs, leaves), cut)
        return SpanGraph(inputs, [out, prefix_run.output], leaves, prefix_run=prefix_run, keys_and_values=cut)

    def backward(
        self, graph: SpanGraph, grad: torch.Tensor, grad_prefix: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Returns gradients by leaf name, in the leaves' shapes. Those of prefix and adapter are summed over the batch.

        Args:
            graph: consumed by the call.
            grad: in the shape of the forward's output.
            grad_prefix: [P, H], or None if no later block reads the prefix.
        """
        run, leaves, to_device = graph.prefix_run, graph.leaves, self.transfers.to_device
        pairs, of_prefix = [(graph.outputs[0], to_device(grad))], []
        if len(graph.outputs) > 1 and grad_prefix is not None:
            of_prefix = [(graph.outputs[1], to_device(grad_prefix))]
        if run is None:
            grads = _gradients([*pairs, *of_prefix], leaves)
        else:
            assert graph.keys_and_values is not None
            found = _gradients(pairs, leaves | dict(enumerate(graph.keys_and_values.tensors())))
            grads = {name: grad for name, grad in found.items() if name in leaves}
            of_prefix += [(made, found[i]) for i, made in enumerate(run.cache.tensors()) if i in found]
            # Other micro-batches may need this graph. LoRA acts on samples and prefix, so its gradients add up.
            for name, grad in _gradients(of_prefix, run.leaves, retain_graph=True).items():
                grads[name] = grads[name] + grad if name in grads else grad
        return {name: grads[name] if name in grads else torch.zeros_like(leaf) for name, leaf in leaves.items()}

    def step(
        self,
        start: int,
        end: int,
        hidden: torch.Tensor,
        cache: SpanCache,
        *,
        adapter: Adapter | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs new positions [B, n, H] after those in `cache`, and adds their keys and values to it.

        Args:
            adapter: of these blocks. Deep prompts are added to the first P of the new positions.
            attention_mask: [B, positions in the cache and new], 0 at padding; None: no padding.
            position_ids: [B, n]; None: they follow the cache. Ignored by families that take positions from the mask.
        """
        blocks = BlockPass(start, end, hidden.to(self.dtype), self._placed(adapter))
        with threads_for(blocks.hidden, cache.get_seq_length()):
            return self._runner.run(blocks, cache, attention_mask=attention_mask, position_ids=position_ids)


def _with_leaves(inputs: SpanInputs, leaves: dict[str, torch.Tensor]) -> SpanInputs:
    adapter = inputs.adapter.with_tensors(leaves) if inputs.adapter is not None else None
    hidden, prefix = leaves.get("hidden", inputs.hidden), leaves.get("prefix", inputs.prefix)
    return replace(inputs, hidden=hidden, prefix=prefix, adapter=adapter)


def _gradients(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], inputs: Mapping[Any, torch.Tensor], retain_graph: bool = False
) -> dict[Any, torch.Tensor]:
    """Gradients by name of those `inputs` that the outputs depend on.

    Args:
        pairs: outputs and their gradients.
        inputs: by name.
        retain_graph: whether the graph is used again.
    """
    pairs = [(out, grad.to(out)) for out, grad in pairs if out.requires_grad]
    if not pairs or not inputs:
        return {}
    found = torch.autograd.grad(
        [out for out, _ in pairs], list(inputs.values()), [grad for _, grad in pairs],
        allow_unused=True, retain_graph=retain_graph,
    )  # fmt: skip
    return {name: grad for name, grad in zip(inputs, found, strict=True) if grad is not None}

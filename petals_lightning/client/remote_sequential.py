"""Blocks that live in a swarm, as a module.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, L blocks, N positions that are read.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from petals_lightning.client.audit import Judge
from petals_lightning.client.autograd import RemoteBlocks, RemoteRunner
from petals_lightning.client.block_pass import BlockPass
from petals_lightning.client.config import ClientConfig
from petals_lightning.client.inference_session import InferenceSession
from petals_lightning.client.pipeline import Pipeline
from petals_lightning.client.positions import gather_positions, scatter_positions
from petals_lightning.client.router import Router
from petals_lightning.client.routing import RouteSpan
from petals_lightning.client.servers import ServerPool
from petals_lightning.client.stats import TransferStats
from petals_lightning.errors import ProtocolError, SwarmConnectionError, UnsupportedInputError
from petals_lightning.protocol.adapters import Adapter, PastKeyValues
from petals_lightning.swarm import SwarmNode


@dataclass
class _Swarm:
    """What all slices of one RemoteSequential share."""

    node: SwarmNode
    servers: ServerPool
    router: Router
    runner: RemoteRunner
    stats: TransferStats
    owns_node: bool
    rotary_switch: int | None

    def __post_init__(self) -> None:
        # Modules, their copies, and graphs that wait for backward refer to the runner as long as they need the swarm.
        self._finalizer = weakref.finalize(self.runner, _close_unused, self.node, self.servers, self.owns_node)
        self._finalizer.atexit = False

    def check_open(self) -> None:
        """Raises SwarmConnectionError if the swarm is closed."""
        if not self._finalizer.alive:
            raise SwarmConnectionError(
                "this model's connection to its swarm is closed: load it again by from_pretrained or, if a Trainer "
                "closed it at its end, give the module to a Trainer again"
            )

    def close(self) -> None:
        if self._finalizer.detach() is not None:
            _close(self.node, self.servers, self.owns_node)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Swarm:
        """A copied model (for weight averaging, say) uses the same connections."""
        return self

    def __reduce__(self) -> NoReturn:
        raise UnsupportedInputError(
            "a model whose blocks are remote cannot be pickled: its connections belong to this process. Save what was "
            "trained (save_pretrained, or state_dict) and load the model where it is needed"
        )


def _close(node: SwarmNode, servers: ServerPool, owns_node: bool) -> None:
    if node.is_running:  # the caller may have closed its own node already
        node.run(servers.close())
    if owns_node:
        node.close()


def _close_unused(node: SwarmNode, servers: ServerPool, owns_node: bool) -> None:
    """Closes for the garbage collector, which may run in any thread, even the loop's: so it must not wait."""
    if node.is_running:
        threading.Thread(target=_close, args=(node, servers, owns_node), name="close swarm").start()


async def _start(servers: ServerPool, router: Router) -> None:
    await servers.start()
    try:
        await router.connect()
    except BaseException:
        await servers.close()
        raise


class RemoteSequential(nn.Module):
    """Blocks [start, end) of a model on servers of a swarm; made by `connect`.

    `layers(hidden_states)` maps [B, S, H] to [B, S, H], with gradients. `layers[a:b]` is a sub-sequence, `layers[i]`
    one block. Iterating yields one module that runs all blocks: decoders loop over their layers, and to them the swarm
    is a single layer.

    Attributes:
        returns_tuple: return outputs in tuples, for decoders that expect this of their blocks. Attention weights, which
            some decoders read from these tuples, are None.
    """

    def __init__(self, swarm: _Swarm, start: int, end: int):
        super().__init__()
        self._swarm, self.start, self.end = swarm, start, end
        self.returns_tuple = False

    @classmethod
    def connect(
        cls,
        node: SwarmNode,
        *,
        dht_prefix: str,
        num_blocks: int,
        hidden_size: int,
        fingerprint: str | None = None,
        config: ClientConfig | None = None,
        owns_node: bool = False,
        rotary_switch: int | None = None,
        sliding_window: int | None = None,
        beyond_petals: str | None = None,
        active_adapter: Adapter | None = None,
        judge: Judge | None = None,
    ) -> RemoteSequential:
        """Finds servers for all blocks of a model and opens streams to a first route.

        Args:
            node: this process's peer, started.
            dht_prefix, num_blocks, hidden_size, fingerprint: identify the model. Servers of other models are not used.
            config: timeouts, filters, wire dtype.
            owns_node: close the node together with the blocks.
            rotary_switch: positions beyond which the model uses other rotary factors for all positions, if it does.
            sliding_window: reach of the model's attention in positions, padding counted; None: unlimited.
            beyond_petals: what the model has that servers with Petals' methods only do not take, e.g. "LoRA": they are
                left out. None: nothing.
            active_adapter: acts in the blocks; servers that do not hold it and cannot be sent it are left out.
            judge: computes blocks on this machine when servers disagree; None: only trusted servers decide.

        Raises:
            NoServersError: no usable server holds some block.
            IncompatibleServerError: all servers that hold some block serve another model.
        """
        config, stats = (config or ClientConfig()).with_token(), TransferStats()
        servers = ServerPool(
            node,
            dht_prefix=dht_prefix,
            num_blocks=num_blocks,
            hidden_size=hidden_size,
            fingerprint=fingerprint,
            sliding_window=sliding_window,
            beyond_petals=beyond_petals,
            active_adapter=active_adapter,
            config=config,
            stats=stats,
        )
        router = Router(servers)
        node.run(_start(servers, router))
        runner = RemoteRunner(node, Pipeline(servers, router, stats, judge))
        return cls(_Swarm(node, servers, router, runner, stats, owns_node, rotary_switch), 0, num_blocks)

    @property
    def stats(self) -> TransferStats:
        """Bytes, requests and retries so far, of all slices together."""
        return self._swarm.stats

    def route(self, tokens: int = 1024) -> list[RouteSpan]:
        """The servers through which a request of `tokens` tokens would go now."""
        self._swarm.check_open()
        return self._swarm.node.run(self._swarm.router.route(self.start, self.end, tokens=tokens))

    def close(self) -> None:
        """Ends the streams (and this process's peer, if it was created for these blocks)."""
        self._swarm.close()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the blocks.

        Args:
            hidden_states: [B, S, H]. Of the decoder's other arguments only a `BlockPass` is used; servers compute masks
                and rotary embeddings themselves.

        Returns:
            [B, S, H]; with `returns_tuple`, inside a tuple.

        Raises:
            SwarmError: servers failed beyond what retries can mend.
        """
        call = BlockPass.among((*args, *kwargs.values())) or BlockPass()
        call.entered = hidden_states
        if call.session is not None:
            output = self._step(hidden_states, call, call.session)
        else:
            if not call.identity:
                output, _ = self.run(hidden_states, prefix=call.prefix, adapter=call.adapter, rows=call.rows)
            else:
                output = hidden_states if call.rows is None else gather_positions(hidden_states, call.rows)
            if call.rows is not None:
                output = scatter_positions(output, call.rows, *hidden_states.shape[:2])
        return (output, None) if self.returns_tuple else output

    def inference_session(
        self, *, max_length: int, prefix: torch.Tensor | None = None, adapter: Adapter | None = None
    ) -> InferenceSession:
        """A session in which `step(hidden_states)` runs one or more positions after all previous ones.

        Args:
            max_length: positions for which servers reserve memory, without the prefix.
            prefix: [P, H] before every sample.
            adapter: of these blocks.

        Raises:
            UnsupportedInputError: shapes do not match. (Servers are asked at the first step.)
        """
        swarm = self._swarm
        swarm.check_open()
        self._check_adapter(prefix, adapter)
        return InferenceSession(
            swarm.node, swarm.servers, swarm.router, swarm.stats, self.start, self.end,
            max_length=max_length, prefix=prefix, rotary_switch=swarm.rotary_switch,
            adapter=swarm.runner.versioned(adapter) if adapter is not None else None,
        )  # fmt: skip

    def fill_past(self, prefix: torch.Tensor, past: Sequence[PastKeyValues]) -> None:
        """Overwrites `past`, of these blocks, with the keys and values that they make of a prefix [P, H].

        Raises:
            SwarmError: servers failed beyond what retries can mend.
        """
        self._swarm.check_open()
        found = Adapter(self.start, self.end, past=tuple(past))
        self._swarm.runner.past(prefix, found)

    def run(
        self,
        hidden_states: torch.Tensor,
        *,
        prefix: torch.Tensor | None = None,
        adapter: Adapter | None = None,
        rows: torch.Tensor | None = None,
        want_prefix: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the blocks with a prefix that all samples share.

        Args:
            hidden_states: [B, S, H] that enter block `start`.
            prefix: [P, H] before every sample.
            adapter: of these blocks.
            rows: [N] indices into B·S of the positions to return.
            want_prefix: return the prefix's output too.

        Returns:
            [B, S, H] or, with rows, [N, H]; and the prefix's [P, H] if wanted.

        Raises:
            UnsupportedInputError: shapes do not match.
            SwarmError: see `forward`.
        """
        if hidden_states.ndim != 3 or not hidden_states.is_floating_point():
            raise UnsupportedInputError(f"hidden_states must be floating [B, S, H], got {tuple(hidden_states.shape)}")
        self._check_adapter(prefix, adapter)
        if hidden_states.shape[0] == 0 or hidden_states.shape[1] == 0:
            return hidden_states, prefix if want_prefix else None
        if rows is not None and not len(rows):
            raise UnsupportedInputError("rows is empty: nothing of the output would be read")
        batch, tokens, _ = hidden_states.shape
        size = self._swarm.router.microbatch_size(self.route(), batch, tokens, len(prefix) if prefix is not None else 0)
        out, prefix_out = RemoteBlocks.apply(
            self._swarm.runner, self.start, self.end, size, want_prefix, rows, adapter, hidden_states, prefix,
            *(adapter.tensors().values() if adapter is not None else ()),
        )  # fmt: skip
        return out, prefix_out if want_prefix and prefix is not None else None

    def _check_adapter(self, prefix: torch.Tensor | None, adapter: Adapter | None) -> None:
        if adapter is not None:
            try:
                adapter.check_fits(self.start, self.end, prefix)
            except ProtocolError as e:
                raise UnsupportedInputError(str(e)) from e

    def _step(self, hidden_states: torch.Tensor, call: BlockPass, session: InferenceSession) -> torch.Tensor:
        tokens = hidden_states.shape[1]
        keep = min(call.keep, tokens)
        out = session.step(hidden_states, attention_mask=call.attention_mask, position_ids=call.position_ids, keep=keep)
        return nn.functional.pad(out, (0, 0, tokens - out.shape[1], 0))

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: int | slice) -> RemoteSequential:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            if step != 1 or first >= last:
                raise IndexError(f"a slice of remote blocks must be contiguous and not empty, got {index}")
        else:
            first = range(len(self))[index]
            last = first + 1
        if (first, last) == (0, len(self)):
            return self
        return RemoteSequential(self._swarm, self.start + first, self.start + last)

    def __iter__(self) -> Iterator[RemoteSequential]:
        yield self

    def extra_repr(self) -> str:
        servers = self._swarm.servers
        return f"blocks {self.start}:{self.end} of {servers.dht_prefix!r} ({servers.num_blocks} blocks, in a swarm)"

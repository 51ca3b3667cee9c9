"""Tensors between host memory and the device that computes.

A CPU needs none of this. Tensors go to and from a GPU through pinned memory, on CUDA streams of their own: while one
request computes, the inputs of the next and the outputs of the last are copied. Nothing here waits. Outputs are still
being copied when a request's work returns; `ComputeThread` waits for `Transfers.mark` before they are read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from petals_lightning.protocol.requests import message_dtype, to_wire


class Transfers:
    """Copies to and from one device. For compute threads, which share the device's current stream.

    Args:
        device: of the span's weights.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._inward = self._outward = None
        if device.type == "cuda":
            self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device, for kernels that are launched after this call."""
        if self._inward is None or tensor.device == self.device:
            return tensor.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._inward):
            moved = tensor.contiguous().pin_memory().to(self.device, non_blocking=True)
        computing.wait_stream(self._inward)
        moved.record_stream(computing)  # otherwise the next input could reuse its memory while kernels still read it
        return moved

    def to_wire(self, tensor: torch.Tensor, wire_dtype: str, *, shared: bool = False) -> torch.Tensor:
        """As `protocol.requests.to_wire`, but without waiting: read the result after the next mark is reached."""
        if self._outward is None:
            return to_wire(tensor, wire_dtype, shared=shared)
        tensor = tensor.detach().to(message_dtype(wire_dtype, shared=shared)).contiguous()
        self._outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._outward):
            sent = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            sent.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._outward)
        return sent

    def outputs_to_wire(self, outputs: dict[str, torch.Tensor], wire_dtype: str) -> dict[str, torch.Tensor]:
        """`to_wire` for the outputs of a forward or a step: `hidden`, and those of the prefix, which samples share."""
        return {name: self.to_wire(tensor, wire_dtype, shared=name != "hidden") for name, tensor in outputs.items()}

    @property
    def is_asynchronous(self) -> bool:
        """Whether work returns before its outputs are ready; see `mark`."""
        return self._outward is not None

    def mark(self) -> Callable[[], None]:
        """Returns a callable that blocks until all work and copies queued so far have finished."""
        assert self._outward is not None
        self._outward.wait_stream(torch.cuda.current_stream(self.device))
        return self._outward.record_event().synchronize

"""Checks of answers: one that cannot be right is its server's failure, not the user's. Pure functions.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, n blocks of the leg, N positions that are read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch

from petals_lightning.errors import NonFiniteResult, WrongResult
from petals_lightning.protocol.messages import Message
from petals_lightning.protocol.quant_types import UNQUANTIZED
from petals_lightning.protocol.requests import ForwardRequest, message_dtype
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.protocol.tensors import DTYPE_NAMES, INT8_BLOCKWISE

# Relative error between honest servers: kernels and the order of summation differ between machines.
_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2, INT8_BLOCKWISE: 1e-1}

# Between weights of a kind and other ones. Measured through 30 blocks of SmolLM2: outputs up to 0.03 (int8) and 0.28
# (nf4), gradients up to 0.10 and 0.79 (benchmarks.quantization). An answer of zeros has the error 1.
_OF_QUANT_TYPE = {UNQUANTIZED: 0.0, "int8": 0.2, "nf4": 0.99}


def check_forward(peer: str, request: ForwardRequest, reply: Message) -> None:
    """Raises WrongResult unless `reply` has the requested tensors, NonFiniteResult if values cannot be right."""
    expected = {"hidden": (output_shape(request), message_dtype(request.wire_dtype))}
    if request.want_prefix and request.prefix is not None:
        expected["prefix"] = list(request.prefix.shape), message_dtype(request.wire_dtype, shared=True)
    if request.past is not None:
        dtype = message_dtype(request.wire_dtype, shared=True)
        expected |= {name: (list(tensor.shape), dtype) for name, tensor in request.past.tensors().items()}
    _check_tensors(peer, reply, expected)
    _check_sound(peer, reply, _inputs(request))


def check_backward(
    peer: str,
    forward: ForwardRequest,
    grads: list[torch.Tensor],
    reply: Message,
    *,
    may_overflow: bool,
) -> None:
    """As `check_forward`, for gradients.

    Args:
        forward: the request whose gradients these are.
        grads: the gradients that were sent. If they are not finite (the loss scale was too large), any answer passes.
        may_overflow: the answer is float16, in which scaled gradients overflow on a healthy server too.
    """
    inputs = {"hidden": forward.hidden if forward.input_grad else None, "prefix": forward.prefix}
    inputs |= forward.adapter.tensors() if forward.adapter is not None else {}
    dtype = message_dtype(forward.wire_dtype)
    expected = {name: (list(tensor.shape), dtype) for name, tensor in inputs.items() if tensor is not None}
    _check_tensors(peer, reply, expected)
    if not may_overflow:
        _check_sound(peer, reply, [*grads, *_inputs(forward)])


def check_step(peer: str, request: StepRequest, reply: Message) -> None:
    """As `check_forward`, for a session's step."""
    batch, tokens, size = request.hidden.shape
    expected = {"hidden": ([batch, request.keep or tokens, size], message_dtype(request.wire_dtype))}
    if request.want_prefix and request.prefix is not None:
        expected["prefix"] = list(request.prefix.shape), message_dtype(request.wire_dtype, shared=True)
    _check_tensors(peer, reply, expected)
    _check_sound(peer, reply, _inputs(request))


def output_shape(request: ForwardRequest) -> list[int]:
    """The shape of `hidden` in the reply: [B, S, H], or [N, H] with rows."""
    return list(request.hidden.shape) if request.rows is None else [len(request.rows), request.hidden.shape[2]]


def reported_seconds(reply: Message, name: str) -> float:
    """A duration that a server reports; 0 if it reports none or an impossible one."""
    value = reply.fields.get(name)
    return float(value) if isinstance(value, (int, float)) and 0 <= value < math.inf else 0.0


def is_sound(tensor: torch.Tensor) -> bool:
    """Whether the tensor's norm is finite in float32: no NaN, no infinity, no value beyond what any network works with.

    Every block begins with a norm, which sums squares. Beyond 1.8e19 the squares overflow, and only noise or zeros come
    out.
    """
    return bool(torch.linalg.vector_norm(tensor, dtype=torch.float32).isfinite())


def disagreement(got: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative error among the tensors that both have; infinite if shapes or soundness differ."""
    worst = 0.0
    for name in got.keys() & other.keys():
        a, b = got[name].float(), other[name].float()
        if a.shape != b.shape or not (is_sound(a) and is_sound(b)):
            if a.shape == b.shape and is_sound(a) == is_sound(b) and torch.equal(a.isfinite(), b.isfinite()):
                continue  # both overflow in the same places
            return math.inf
        scale = max(a.norm().item(), b.norm().item())
        worst = max(worst, (a - b).norm().item() / scale if scale else 0.0)
    return worst


def tolerance(dtype_names: Iterable[str | None], quant_types: Collection[str] = ()) -> float:
    """The relative error allowed between honest results.

    Args:
        dtype_names: that they were computed or sent in.
        quant_types: of the weights that they were computed with.
    """
    rounding = max(_TOLERANCE.get(name or "float32", _TOLERANCE["bfloat16"]) for name in dtype_names)
    if len(set(quant_types)) < 2:
        return rounding
    return max(rounding, *(_OF_QUANT_TYPE.get(each, max(_OF_QUANT_TYPE.values())) for each in quant_types))


def _inputs(request: ForwardRequest | StepRequest) -> list[torch.Tensor]:
    adapter = request.adapter.tensors().values() if request.adapter is not None else ()
    return [tensor for tensor in (request.hidden, request.prefix, *adapter) if tensor is not None]


def _check_tensors(peer: str, reply: Message, expected: dict[str, tuple[list[int], torch.dtype]]) -> None:
    for name, (shape, dtype) in expected.items():
        tensor = reply.tensors.get(name)
        if tensor is None or list(tensor.shape) != shape or tensor.dtype != dtype:
            got = f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}" if tensor is not None else "nothing"
            raise WrongResult(peer, f"answered {got} as {name!r}, asked for {DTYPE_NAMES[dtype]} {shape}")


def _check_sound(peer: str, reply: Message, inputs: list[torch.Tensor]) -> None:
    broken = next((tensor for tensor in reply.tensors.values() if not is_sound(tensor)), None)
    if broken is None or not all(is_sound(tensor) for tensor in inputs):
        return
    if broken.isfinite().all():
        largest = broken.abs().max().item()
        raise NonFiniteResult(peer, f"answered values of up to {largest:.1e}, whose squares overflow in float32")
    raise NonFiniteResult(peer, "answered NaN or infinity for finite inputs")

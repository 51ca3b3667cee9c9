"""What comes packed takes no more memory when it is unpacked than it is charged with, whatever its shape."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from google.protobuf.message import DecodeError
from hivemind.proto.runtime_pb2 import ExpertRequest, Tensor

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.petals.wire import REQUEST

SLACK = 16 << 20  # code that is run for the first time
MEASURE = """
import json, os, resource, torch
from hivemind.proto.runtime_pb2 import Tensor
from petals_lightning.protocol.petals.tensors import TensorJoiner
from petals_lightning.protocol.tensors import packed_size, unpack_tensors

torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def measure(name, charged, unpack):  # in a process of its own: a peak never comes down again
    if os.fork() == 0:
        before = peak()
        kept = unpack()
        print(json.dumps([name, charged, peak() - before]), flush=True)
        os._exit(0)
    os.wait()

for name, shape in {"one column": [1 << 24, 1], "odd columns": [1 << 18, 65], "plain": [1 << 16, 512]}.items():
    description = [["a", "int8_blockwise", shape]]
    body = bytearray(packed_size(description)[0])
    measure(name, packed_size(description)[1] - len(body), lambda: unpack_tensors(description, body))
for name, compression in {"float16": 2, "meanstd": 1, "uniform": 4}.items():
    count, charged = 1 << 24, []
    body = bytes(2 * count + (8 if compression == 1 else 0))
    if compression == 4:
        body = (256).to_bytes(8, "little") + bytes(4 * 256 + count)
    joiner = TensorJoiner(max_bytes=1 << 30, max_tensors=1, reserve=charged.append)
    joiner.add([Tensor(buffer=body, size=[count], dtype="float32", compression=compression)])
    measure(name, charged[-1] - len(body), joiner.finish)
"""


@pytest.mark.slow
def test_unpacking_takes_what_it_is_charged_with():
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == 6
    for name, charged, taken in found:
        assert 0.5 * charged < taken < 1.1 * charged + SLACK, f"{name}: {taken >> 20} MiB for {charged >> 20}"


def test_protobufs_that_become_larger_than_they_look_are_refused():
    good = ExpertRequest(uid="a b", tensors=[Tensor(buffer=b"x" * 300, size=[3, 1 << 20], dtype="bool")], metadata=b"y")
    assert REQUEST.FromString(good.SerializeToString()) == good
    with pytest.raises(ProtocolError, match="more than 64 fields"):
        REQUEST.FromString(b"\x12\x00" * 65)
    with pytest.raises(ProtocolError, match="more than 64 fields"):  # shapes need not be packed
        REQUEST.FromString(b"\x12\x82\x01" + b"\x10\x01" * 65)
    with pytest.raises(ProtocolError, match="shape has 65 bytes"):
        REQUEST.FromString(ExpertRequest(tensors=[Tensor(size=[1] * 65)]).SerializeToString())
    for broken in (b"\x12", b"\x12\x05a", b"\x0b", b"\xff" * 11, b"\x0a\xff\xff\xff\xff\x7f"):
        with pytest.raises(DecodeError):
            REQUEST.FromString(broken)

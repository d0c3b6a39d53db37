"""Errors of the device and of collectives: which tell of a lost peer, which of memory that is out, and what is said."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megasparse.launching.failures import is_lost_peer, is_out_of_memory

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, {}, NCCL version 2.27.5\n{}"
CUDA_OUT = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
    "free. Of the allocated memory 70.2 GiB is allocated by PyTorch, and 1.1 GiB is in NCCL's buffers."
)
NCCL_OUT = dist.DistBackendError(
    NCCL.format(
        "unhandled cuda error",
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 'out of memory'",
    )
)
GONE = [
    dist.DistBackendError(
        NCCL.format(
            "remote process exited or there was a network error",
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        )
    ),
    dist.DistBackendError("NCCL communicator was aborted on rank 1."),
    dist.DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:49"),
    dist.DistNetworkError("The client socket has failed to connect to any network address of (n1, 29500)."),
    dist.DistStoreError("wait timeout after 100ms, keys: /x"),
]
OTHER = [
    dist.DistBackendError(
        NCCL.format(
            "invalid usage",
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
            "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
        )
    ),
    dist.DistBackendError(
        NCCL.format(
            "unhandled system error",
            "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
            "Last error:\nError while creating shared memory segment /dev/shm/nccl-vzIpS6 (size 9637888)",
        )
    ),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("No backend type associated with device type cpu; the group is of nccl"),
    ValueError("connection reset"),
]


@pytest.mark.parametrize("error", [CUDA_OUT, NCCL_OUT], ids=["cuda", "nccl"])
def test_memory_that_is_out_is_no_lost_peer(error) -> None:
    assert is_out_of_memory(error) and not is_lost_peer(error)


@pytest.mark.parametrize("error", GONE, ids=range(len(GONE)))
def test_collectives_without_a_peer_are_recognised(error) -> None:
    assert is_lost_peer(error) and not is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER, ids=range(len(OTHER)))
def test_the_name_of_a_library_tells_nothing(error) -> None:
    assert not is_lost_peer(error) and not is_out_of_memory(error)


def test_out_of_memory_is_told_in_one_line_with_what_needs_less() -> None:
    program = """
import torch
from megasparse.launching.failures import GO_ON, exit_after_lost_peer
with exit_after_lost_peer(3, GO_ON):
    torch.empty(2**50)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: rank 3 is out of memory: ") and "you tried to allocate 4503599627370496" in line
    for setting in ("train.micro_batch_size", "train.activation_recomputation", "deepspeed.zero_stage"):
        assert setting in line
    assert "lost contact" not in line

"""The Triton kernels of hybrid sparse attention in Triton's interpreter on the CPU, against the float64 reference.

Run by test_hybrid_attention_triton.py in a process of its own, because TRITON_INTERPRET=1 must be set before Triton is
imported and would change every other kernel of that process. `python interpreted_attention.py CASE ...`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from megasparse.kernels.hybrid_attention import gpu_tiles, hybrid_attention, operators  # noqa: E402
from megasparse.kernels.hybrid_attention.gpu_tiles import Tile, launches  # noqa: E402

attend = partial(hybrid_attention, kernel="triton")


def inputs(samples: int, heads: int, groups: int, seq_length: int, head_dim: int) -> list[torch.Tensor]:
    """Tensors that require gradients, with the strides that the attention layer makes."""
    shapes = [(samples, seq_length, count, head_dim) for count in (heads, groups, groups)]
    return [torch.randn(shape).transpose(1, 2).requires_grad_() for shape in shapes]


def check(
    pattern: str,
    seq_length: int,
    stride: int,
    *,
    samples: int = 1,
    heads: int = 2,
    groups: int = 1,
    head_dim: int = 16,
    documents: torch.Tensor | None = None,
    offsets: int | tuple[int, ...] = 0,
) -> None:
    """Outputs and all gradients; NaN in any of them fails."""
    tensors = inputs(samples, heads, groups, seq_length, head_dim)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    got = hybrid_attention(*tensors, pattern, stride, "triton", documents, offsets=offsets)
    expected = hybrid_attention(*wide, pattern, stride, "reference", documents, offsets=offsets)
    dy = torch.randn_like(got)
    mine = (got, *torch.autograd.grad(got, tensors, dy))
    reference = (expected, *torch.autograd.grad(expected, wide, dy.double()))
    for name, a, b in zip(("y", "dq", "dk", "dv"), mine, reference, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        # Sums of some hundred products of order 1, of weights that are wrong by a few units in the last place.
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@contextmanager
def small(side: int = 16, chunk: int = 2, tiles_from: int = 1000) -> Iterator[None]:
    """Tiles of `side` x `side`, so that short sequences have several; far keys as tiles from `tiles_from` tokens on."""
    names = "forward_tile", "query_gradient_tile", "key_gradient_tile", "STRIDED_TILES_FROM", "SPARSE_TILES_FROM"
    before = {name: getattr(gpu_tiles, name) for name in names}
    try:
        for name in names:
            new = tiles_from if name.isupper() else lambda *shape: Tile(side, side, chunk, warps=4, stages=2)
            setattr(gpu_tiles, name, new)
        yield
    finally:
        for name, value in before.items():
            setattr(gpu_tiles, name, value)


def documents_of(*lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) * 3 + 1 for row in lengths])


def defaults() -> None:
    """Default tiles, lengths that are no multiples of anything, strides that are no powers of two."""
    for pattern, seq_length, stride in (
        *(("local", 75, 16), ("fixed", 75, 20), ("strided", 75, 16), ("sparse", 75, 16)),
        *(("strided", 49, 3), ("sparse", 101, 3), ("full", 41, 16)),
    ):
        check(pattern, seq_length, stride)


def edges() -> None:
    """One token, fewer tokens than the stride, whole blocks, stride 1; odd head dimensions and factors."""
    with small(tiles_from=9):
        for pattern in ("local", "strided", "sparse", "fixed"):
            for seq_length, stride in ((1, 4), (5, 9), (16, 8), (17, 1), (35, 12)):
                check(pattern, seq_length, stride, heads=1, head_dim=5)
    check("sparse", 33, 16, heads=1, head_dim=80)
    check("fixed", 33, 16, heads=1, head_dim=24)


def heads() -> None:
    """Documents, grouped-query heads and an offset for each head, all at once."""
    documents = documents_of((1, 14, 3, 11), (18, 11))
    for pattern, stride, tiles_from, offsets in (
        *(("local", 8, 1000, 0), ("full", 8, 1000, 0), ("fixed", 8, 1000, (0, 5)), ("fixed", 7, 1000, 3)),
        *(("strided", 8, 1000, (3, 7)), ("strided", 4, 1, (0, 3))),
        *(("sparse", 8, 1000, (1, 0)), ("sparse", 4, 1, (2, 3))),
    ):
        with small(tiles_from=tiles_from):
            check(pattern, 29, stride, samples=2, documents=documents, offsets=offsets)
    with small(side=32):
        check("fixed", 29, 8, heads=6, groups=2, offsets=(0, 1, 7, 3, 4, 5))
        check("sparse", 29, 8, heads=6, groups=2, offsets=(0, 1, 7, 3, 4, 5))


def layout() -> None:
    """Any strides of the inputs, no tokens at all, equal bits in every run; what is launched and what it fills."""
    q, k, v = (x.detach() for x in inputs(1, 2, 1, 40, 16))
    for settings in (("fixed", 8), ("sparse", 1)):
        plain = attend(q, k, v, *settings)
        assert plain.transpose(1, 2).is_contiguous()
        turned = [x.mT.contiguous().mT for x in (q, k, v)]
        assert torch.equal(attend(*turned, *settings), plain)
    assert len(launches("sparse", 40, 1)) == 2
    assert attend(q[:, :, :0], k[:, :, :0], v[:, :, :0], "local", 8).shape == (1, 2, 0, 16)
    twice = []
    for _ in range(2):
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        attend(*tensors, "fixed", 8, offsets=[1, 2]).square().sum().backward()
        twice.append([x.grad for x in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def compiled() -> None:
    """torch.compile sees two calls with the outputs that they really have; heads of several patterns and offsets."""
    tensors = inputs(1, 4, 2, 20, 16)
    patterns, offsets = ("local", "fixed", "strided", "fixed"), (0, 1, 3, 2)

    def function(*given: torch.Tensor) -> torch.Tensor:
        return hybrid_attention(*given, patterns, 4, "triton", offsets=offsets)

    eager, traced = function(*tensors), torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors)
    assert torch.equal(eager, traced)
    dy = torch.randn_like(eager)
    pairs = zip(*(torch.autograd.grad(y, tensors, dy) for y in (eager, traced)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    expected = hybrid_attention(*tensors, patterns, 4, "reference", offsets=offsets)
    torch.testing.assert_close(eager, expected, rtol=2e-5, atol=2e-5)
    for documents, extra in ((None, [0] * 4), (documents_of((7, 13)), [1, 2, 3, 0])):
        q, k, v = (x.detach() for x in tensors)
        settings = [operators.PATTERNS.index("fixed")] * 4, 4, extra, "triton"
        out, lse = operators.attention_forward(q, k, v, documents, *settings)
        for op, given in (
            (operators.attention_forward, (q, k, v, documents)),
            (operators.attention_backward, (torch.randn_like(out), q, k, v, documents, out, lse)),
        ):
            torch.library.opcheck(op, (*given, *settings), test_utils=("test_schema", "test_faketensor"))


CASES = {"defaults": defaults, "edges": edges, "heads": heads, "layout": layout, "compiled": compiled}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(7)
    for name in sys.argv[1:]:
        CASES[name]()
        print(f"{name}: passed")

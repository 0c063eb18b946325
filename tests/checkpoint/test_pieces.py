"""Host copies take the memory that ``pinned_bytes`` says, and no more than a little beyond the pieces."""

from __future__ import annotations

import torch

from fsdpsft.checkpoint.pieces import SLAB_BYTES, Staging, piece_of, pinned_bytes


def test_staging_takes_what_is_foretold_once() -> None:
    sizes = [3, 70_000, 5_000_001, 9_000_000, 0, 40_000_000, 1]
    tensors = {f"{i}": torch.full((size,), i, dtype=torch.int8) for i, size in enumerate(sizes)}
    staging = Staging()
    for round_number in range(2):
        copies = [staging.copy(piece_of(name, tensor, 0)) for name, tensor in tensors.items()]
        staging.finish()
        assert staging.reserved == pinned_bytes(sizes), round_number
    for copy, tensor in zip(copies, tensors.values(), strict=True):
        assert copy.local is not None and torch.equal(copy.local, tensor)
        assert copy.local.numel() == 0 or copy.local.data_ptr() != tensor.data_ptr()


def test_a_7b_model_pins_little_more_than_it_has() -> None:
    """Qwen2.5-7B: float32 weights and two bfloat16 moments. Rounded up to powers of two they would take 80.9 GiB."""
    hidden, wide, keys, layers, vocabulary = 3584, 18944, 512, 28, 152064
    block = [hidden * hidden, hidden, keys * hidden, keys, keys * hidden, keys, hidden * hidden]
    block += [wide * hidden, wide * hidden, hidden * wide, hidden, hidden]
    elements = [vocabulary * hidden, *block * layers, hidden, vocabulary * hidden]
    sizes = [4 * n for n in elements] + [2 * n for n in elements for _ in range(2)]
    rounded = sum(1 << (size - 1).bit_length() for size in sizes)
    needed, taken = sum(sizes), pinned_bytes(sizes)
    assert round(needed / 2**30, 1) == 56.7
    assert needed <= taken < needed * 1.005 < 0.75 * rounded
    assert pinned_bytes([100] * 1000) == SLAB_BYTES

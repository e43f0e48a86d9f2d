"""The packed vector of statistics (spec.PACKED): its layout, and how its parts are read."""

from __future__ import annotations

from torch import Tensor

from .spec import PACKED, PER_BRANCH, SUMS, BranchStats


def _sizes_of(modalities: int) -> tuple[int, ...]:
    branches = modalities + 1
    own = {"sums": len(SUMS) * branches} | dict.fromkeys(PER_BRANCH, branches)
    return tuple(own.get(field, modalities) for field in PACKED)


# every step asks; a table is faster than the loop
_TABLE = tuple(_sizes_of(modalities) for modalities in range(65))
_FIXED = sum(_TABLE[0])  # the length is linear in M
_PER_MODALITY = sum(_TABLE[1]) - _FIXED


def packed_sizes(modalities: int) -> tuple[int, ...]:
    """The number of entries of every field."""
    return _TABLE[modalities] if modalities < len(_TABLE) else _sizes_of(modalities)


def packed_length(modalities: int) -> int:
    """The number of entries of the packed vector."""
    return _PER_MODALITY * modalities + _FIXED


def packed_offset(field: str, modalities: int) -> int:
    """Where a field of the packed vector begins."""
    return sum(packed_sizes(modalities)[: PACKED.index(field)])


def modalities_of(packed: Tensor) -> int:
    """M, from the length of a packed vector."""
    return (packed.shape[0] - _FIXED) // _PER_MODALITY


def unpack(packed: Tensor) -> BranchStats:
    """Packed vector -> BranchStats, which share its memory."""
    sizes = packed_sizes(modalities_of(packed))
    # unsafe: without the records by which autograd sees a write into a view, and at half the cost
    return BranchStats(*packed.unsafe_split_with_sizes(sizes)[: len(BranchStats._fields)])


def link_gradient(packed: Tensor) -> Tensor:
    """Packed vector -> gains - 1, [M], the gradient that the link gets."""
    modalities = modalities_of(packed)
    return packed.narrow(0, packed_offset("link", modalities), modalities)


def unpack_sums(packed: Tensor) -> Tensor:
    """Packed vector -> the sums [6, M+1], rows as in spec.SUMS."""
    modalities = modalities_of(packed)
    return packed[packed_offset("sums", modalities) :].view(len(SUMS), modalities + 1)

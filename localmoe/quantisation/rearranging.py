"""Rows and columns of weights in another order, whatever their format; knows no family and no name."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import F32, Format, MadeSlabs, Weight
from localmoe.kernels.reference_weights import values
from localmoe.loader.source import shown

Order = npt.NDArray[np.int64]


def from_array(name: str, array: npt.NDArray[Any]) -> Weight:
    """A weight of float32 values."""
    data = np.ascontiguousarray(array, np.float32).view(np.uint8).reshape(-1)
    return Weight.whole(name, array.shape, F32, data)


def is_planned(weight: Weight) -> bool:
    """Whether it has a size and no memory behind it."""
    return not isinstance(weight.slabs, MadeSlabs) and weight.slabs[0].strides == (0,)


def without_bytes(name: str, shape: tuple[int, ...], format: Format) -> Weight:
    """A weight that has a size and no memory behind it."""
    nbytes = prod(shape[:-1]) * format.row_nbytes(shape[-1])
    return Weight.whole(name, shape, format, np.broadcast_to(np.uint8(0), nbytes))


def written_out(weight: Weight) -> Weight:
    """A weight without scales beside it: where it has some, their products, as float32."""
    return from_array(weight.name, values(weight)) if weight.scales else weight


def with_rows(make: Callable[[], Weight], order: Order) -> Weight:
    """The rows order[0], order[1] … of a matrix, or such elements of a vector.

    Raises FileFormatError where it has not as many.
    """
    weight = written_out(make())
    (data,) = weight.slabs
    if weight.shape[0] != order.size:
        raise FileFormatError(f"tensor {shown(weight.name)} has {weight.shape[0]} rows, expected {order.size}")
    turned = np.ascontiguousarray(data.reshape(order.size, -1)[order])
    return Weight(weight.name, weight.shape, weight.format, (turned.reshape(-1),))


def with_columns(make: Callable[[], Weight], order: Order, width: int) -> Weight:
    """Groups of `width` columns of a matrix: the groups order[0], order[1] … of each row.

    Raises: FileFormatError where it has not as many, UnsupportedError where a group is not whole blocks.
    """
    weight = written_out(make())
    (data,) = weight.slabs
    if weight.columns != order.size * width:
        raise FileFormatError(
            f"tensor {shown(weight.name)} has {weight.columns} columns, expected {order.size * width}"
        )
    if width % weight.format.elements:
        found = f"tensor {shown(weight.name)} is {weight.format.name}, of {weight.format.elements} columns a block"
        raise UnsupportedError(f"{found}; groups of {width} columns cannot change places")
    turned = np.ascontiguousarray(data.reshape(weight.rows, order.size, -1)[:, order])
    return Weight(weight.name, weight.shape, weight.format, (turned.reshape(-1),))

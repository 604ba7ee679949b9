"""Arrays in msgpack as the package msgpack-numpy lays them out, in which RLlib records episodes.

    array   {b"nd": True,  b"type": "<f4", b"kind": b"", b"shape": [2, 3], b"data": bytes}
    number  {b"nd": False, b"type": "<f4", b"data": bytes}

Arrays of Python objects are pickles there (kind b"O"): these are never read here.
"""

from __future__ import annotations

from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np


class UnreadableError(ValueError):
    """Bytes that are no msgpack, or hold what isn't read here."""


def pack(value: Any) -> bytes:
    return msgpack.packb(value, default=_encode)


def unpack(data: bytes) -> Any:
    """The inverse of `pack`. Objects become None. Raises UnreadableError."""
    try:
        return msgpack.unpackb(data, object_hook=_decode, strict_map_key=False)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise UnreadableError(str(error) or type(error).__name__) from None


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value).tobytes()
        return {
            b"nd": True,
            b"type": value.dtype.str,
            b"kind": b"",
            b"shape": list(value.shape),
            b"data": data,
        }
    if isinstance(value, np.generic):
        return {b"nd": False, b"type": value.dtype.str, b"data": value.tobytes()}
    raise TypeError(f"{type(value).__name__} can't be packed")


def _decode(value: dict[Any, Any]) -> Any:
    if b"nd" not in value:
        return value
    if value.get(b"kind") in (b"O", b"V") or not isinstance(value[b"type"], str):
        return None
    dtype = np.dtype(value[b"type"])
    if dtype.hasobject:
        return None
    array = np.frombuffer(value[b"data"], dtype)
    return array.reshape(value[b"shape"]) if value[b"nd"] else array[0]

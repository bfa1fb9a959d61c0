"""Entries of an int64 array that several threads look at and change, in compiled code.

Numba has no such operations on a CPU; these are LLVM's. Orderings are those of C++: who sees a
number also sees what the thread that wrote it had written before.

Reads, writes: arrays. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from featcache.compiling import intrinsic

_utils: Any = cgutils
_BYTES = 8
_IS_X86 = platform.machine() in {"x86_64", "AMD64"}


@intrinsic
def look(_: Any, array: Any, index: Any) -> Any:
    """Return an entry."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(
            _place(context, builder, signature, arguments), "acquire", _BYTES
        )

    return types.int64(array, types.intp), generate


@intrinsic
def add(_: Any, array: Any, index: Any, amount: Any) -> Any:
    """Add to an entry; return what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _place(context, builder, signature, arguments)
        return builder.atomic_rmw("add", place, arguments[2], "acq_rel")

    return types.int64(array, types.intp, types.int64), generate


@intrinsic
def exchange(_: Any, array: Any, index: Any, expected: Any, value: Any) -> Any:
    """Set an entry if it is as expected; return whether it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _place(context, builder, signature, arguments)
        pair = builder.cmpxchg(place, arguments[2], arguments[3], "acq_rel", "acquire")
        return builder.extract_value(pair, 1)

    return types.boolean(array, types.intp, types.int64, types.int64), generate


@intrinsic
def pause(_: Any) -> Any:
    """Leave the core to its other hardware thread for some nanoseconds; nothing but on x86."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _IS_X86:
            kind, name = ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"
            builder.call(_utils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), generate


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Return a pointer to an entry of an array, the first two arguments."""
    kind = signature.args[0]
    array = context.make_array(kind)(context, builder, arguments[0])
    return _utils.get_item_pointer(context, builder, kind, array, [arguments[1]])

"""Vectors of float32 in registers, for code that LLVM compiles: Numba has no words for them.

What is here writes code, by llvmlite, into the functions that Numba compiles (its intrinsics). As
wide as the processor's registers are; LLVM cuts them where they are narrower.

Reads, writes: arrays, where they are told to. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target

INDEX, NOTHING = types.intp, types.void

_utils: Any = cgutils
FEATURES: str = cpu_target.target_context.codegen().magic_tuple()[2]
"""Of the processor that Numba compiles for: its caches are kept apart by them."""

LANES = 16 if "+avx512f" in FEATURES else 8 if "+avx2" in FEATURES else 4
PANEL = 2 * LANES
"""Columns that are worked on at once."""
UNITS = 4 if LANES == 8 else 8
"""Rows that are worked on at once: ``UNITS`` x ``PANEL`` sums in registers, of which there are 32
with AVX-512 and on ARM, 16 with AVX2. Fewer than 8 vectors of sums would wait for one another: a
sum takes 4 cycles, and two are begun in each."""

_FLOAT, _INT, _INT32, _BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)
VECTOR = ir.VectorType(_FLOAT, LANES)
_ALIGNED = 4  # arrays begin where they like

Value = Any  # of LLVM: a number, a vector or a pointer that is there when the code runs
Pair = Sequence[Value]  # the two vectors of a panel


class Corner(NamedTuple):
    """Where a part of a matrix begins: a pointer, and the bytes to its next row and column."""

    place: Value
    strides: Sequence[Value]


class Array:
    """An array of float32 in the code that is written.

    Args:
        code: That it is used in.
        kind: Numba's type of it.
        value: Numba's value of it.
    """

    def __init__(self, code: Code, kind: Any, value: Value) -> None:
        array = code.context.make_array(kind)(code.context, code.builder, value)
        self._code, self._data = code, code.builder.bitcast(array.data, _BYTE.as_pointer())
        self.strides = _utils.unpack_tuple(code.builder, array.strides)  # in bytes
        self.shape = _utils.unpack_tuple(code.builder, array.shape)

    def at(self, *indices: Value) -> Value:
        """Return a pointer to an element."""
        build, place = self._code.builder, self._data
        for index, stride in zip(indices, self.strides, strict=True):
            place = build.gep(place, [build.mul(index, stride)])
        return build.bitcast(place, _FLOAT.as_pointer())

    def corner(self, row: Value, column: Value) -> Corner:
        """Return where the part of a matrix from a row and a column on begins."""
        return Corner(self.at(row, column), self.strides)


class Code:
    """Where code is written.

    Args:
        context: Numba's.
        builder: llvmlite's.
    """

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder
        self._mask: Pair | None = None

    def array(self, signature: Any, arguments: Sequence[Value], place: int) -> Array:
        """Return an argument that is an array."""
        return Array(self, signature.args[place], arguments[place])

    def whole(self, number: int) -> Value:
        """Return a whole number."""
        return _INT(number)

    def all(self, number: float) -> Value:
        """Return a vector of one number."""
        return VECTOR([_FLOAT(number)] * LANES)

    def spread(self, number: Value) -> Value:
        """Return a vector of one float32."""
        return self._spread(number, VECTOR)

    def moved(self, pointer: Value, num_bytes: Value) -> Value:
        """Return a pointer some bytes from another."""
        place = self.builder.bitcast(pointer, _BYTE.as_pointer())
        return self.builder.bitcast(self.builder.gep(place, [num_bytes]), pointer.type)

    def keep_within(self, num_columns: Value) -> None:
        """From here on read zeros, and write nothing, beyond some columns of a panel."""
        kind = ir.VectorType(_INT32, LANES)
        end = self._spread(self.builder.trunc(num_columns, _INT32), kind)
        low, high = (
            self.builder.icmp_signed("<", kind([_INT32(start + i) for i in range(LANES)]), end)
            for start in (0, LANES)
        )
        self._mask = low, high

    def load(self, pointer: Value) -> Pair:
        """Read a panel."""
        low, high = self._places(pointer)
        if self._mask is None:
            return tuple(self.builder.load(place, align=_ALIGNED) for place in (low, high))
        return tuple(
            self._call(
                f"llvm.masked.load.v{LANES}f32.p0", VECTOR, place, _INT32(_ALIGNED), mask,
                self.all(0),
            )
            for place, mask in zip((low, high), self._mask, strict=True)
        )  # fmt: skip

    def store(self, panel: Pair, pointer: Value) -> None:
        """Write a panel."""
        places = self._places(pointer)
        if self._mask is None:
            for vector, place in zip(panel, places, strict=True):
                self.builder.store(vector, place, align=_ALIGNED)
            return
        for vector, place, mask in zip(panel, places, self._mask, strict=True):
            name = f"llvm.masked.store.v{LANES}f32.p0"
            self._call(name, ir.VoidType(), vector, place, _INT32(_ALIGNED), mask)

    def read(self, pointer: Value) -> Value:
        """Read one float32 and return a vector of it."""
        return self.spread(self.builder.load(pointer))

    def multiply_add(self, left: Value, right: Value, more: Value) -> Value:
        """Return left times right plus more, rounded once where the processor can."""
        return self._call(f"llvm.fmuladd.v{LANES}f32", VECTOR, left, right, more)

    def root(self, vector: Value) -> Value:
        """Return square roots."""
        return self._call(f"llvm.sqrt.v{LANES}f32", VECTOR, vector)

    def add_products(
        self, left: Corner, right: Corner, depth: Value, sums: Sequence[Pair]
    ) -> list[tuple[Value, Value]]:
        """Return sums plus products of a matrix (units, depth) and one (depth, ``PANEL``).

        Args:
            left: Of the first matrix.
            right: Of the second.
            depth: How many terms a sum gets; one or more.
            sums: A panel for each unit.
        """
        build, entry = self.builder, self.builder.block
        rows = [self.whole(0)] + [
            self._opaque(build.mul(self.whole(unit), left.strides[0]))
            for unit in range(1, len(sums))
        ]
        starts = [self.whole(0), left.place, right.place, *itertools.chain(*sums)]
        loop, after = (build.append_basic_block(name) for name in ("depth", "after"))
        build.branch(loop)
        build.position_at_end(loop)
        step, at_left, at_right = (build.phi(start.type) for start in starts[:3])
        before = [(build.phi(VECTOR), build.phi(VECTOR)) for _ in sums]
        low, high = self.load(at_right)
        panels = []
        for row, (of_low, of_high) in zip(rows, before, strict=True):
            factor = self.read(self.moved(at_left, row))
            panels.append(
                (self.multiply_add(factor, low, of_low), self.multiply_add(factor, high, of_high))
            )
        values = [step, at_left, at_right, *itertools.chain(*before)]
        ends = [
            build.add(step, self.whole(1)), self.moved(at_left, left.strides[1]),
            self.moved(at_right, right.strides[0]), *itertools.chain(*panels),
        ]  # fmt: skip
        for value, start, end in zip(values, starts, ends, strict=True):
            value.add_incoming(start, entry)
            value.add_incoming(end, loop)
        build.cbranch(build.icmp_signed("<", ends[0], depth), loop, after)
        build.position_at_end(after)
        return panels

    def _places(self, pointer: Value) -> list[Value]:
        build = self.builder
        return [
            build.bitcast(build.gep(pointer, [self.whole(start)]), VECTOR.as_pointer())
            for start in (0, LANES)
        ]

    def _spread(self, number: Value, kind: Any) -> Value:
        nothing, build = ir.Constant(kind, ir.Undefined), self.builder
        first = build.insert_element(nothing, number, _INT32(0))
        order = ir.VectorType(_INT32, LANES)([_INT32(0)] * LANES)
        return build.shuffle_vector(first, nothing, order)

    def _opaque(self, number: Value) -> Value:
        """Return a number that LLVM cannot see through.

        It would make a chain of additions of the rows' offsets, each waiting for the one before: 11
        cycles for every 16 sums in place of 8, measured on a Xeon.
        """
        kind = ir.FunctionType(_INT, [_INT])
        return self.builder.asm(kind, "", "=r,0", [number], side_effect=False)

    def _call(self, name: str, result: Any, *arguments: Value) -> Value:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = _utils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, arguments)

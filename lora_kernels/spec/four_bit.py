"""Four-bit weights, NF4 and FP4, as bitsandbytes stores them: what the bytes mean, and a quantiser
that makes the same bytes.

A weight [rows, cols] is taken flat, row by row, and cut into blocks of ``block`` values, the last
one shorter. A value is ``code[q] * absmax[its block]`` with q in [0, 16); two q share a byte, the
first in the high half. With double quantisation ``absmax[i] = code8[a] * absmax2[i // 256] +
offset``, each step rounded to float32, a a byte.

Sources: NF4 and double quantisation are QLoRA's (Dettmers et al., arXiv:2305.14314), the 8-bit map
is of Dettmers et al., arXiv:2110.02861; the layout is bitsandbytes' ``QuantState``.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# NF4: quantiles of a normal distribution. FP4: a sign, two bits of exponent and one of mantissa, as
# parts of 12, their largest.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
QUANT_TYPES = ("nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Of double quantisation.
OUTER_BLOCK = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Nested(NamedTuple):
    """What turns the bytes of a double-quantised absmax into floats."""

    code: Tensor  # float32 [256]
    absmax: Tensor  # float32 [ceil(blocks / 256)]
    offset: Tensor  # float32, 0-d


class QuantState(NamedTuple):
    """What the bytes of a four-bit weight mean."""

    quant_type: str
    # of the weight: [N, K], or [K, N] for transformers' Conv1D; of a mixture's experts [E, N, K] or
    # [E, K, N], flat one after the other
    shape: tuple[int, ...]
    block: int
    # what the weight was quantised from, and what it is decoded to by default
    dtype: torch.dtype
    absmax: Tensor  # float32 [blocks]; uint8 with double quantisation
    nested: Nested | None = None

    def to(self, device: torch.device | str) -> QuantState:
        nested = self.nested
        if nested is not None:
            nested = Nested(*[t.to(device) for t in nested])
        return self._replace(absmax=self.absmax.to(device), nested=nested)

    def tensors(self) -> list[Tensor]:
        """As the operators take them: code [16], absmax, and of a nested one code [256], absmax2
        and offset."""
        return [code_of(self.quant_type, self.absmax.device), self.absmax, *(self.nested or ())]

    @property
    def nbytes(self) -> int:
        return self.absmax.nbytes + sum(t.nbytes for t in self.nested or ())


# No functools.cache: Dynamo looks through one, with a warning, and makes the values in every call.
_codes: dict[tuple[str, torch.device], Tensor] = {}


def code_of(quant_type: str, device: torch.device | str) -> Tensor:
    """The sixteen values of a type, float32."""
    key = quant_type, torch.device(device)
    if key not in _codes:
        fp4 = [v / 12.0 for v in _FP4_TWELFTHS]
        values = list(_NF4) if quant_type == "nf4" else fp4 + [-v if v else 0.0 for v in fp4]
        # One made in inference mode could not be saved for a backward later.
        with torch.inference_mode(False):
            code = torch.tensor(values, dtype=torch.float32, device=device)
        if type(code) is not Tensor:
            # A fake tensor, while a model is exported.
            return code
        _codes[key] = code
    return _codes[key]


@functools.cache
def code8_of(device: torch.device | str) -> Tensor:
    """The 256 values of the signed dynamic map: of each of seven decades the middles of 1, 2, 4 ...
    64 steps from a tenth of it to it, with both signs, and 0 and 1."""
    values = [0.0, 1.0]
    with torch.inference_mode(False):
        for decade in range(7):
            edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
            middles = ((edges[:-1] + edges[1:]) / 2.0 * 10 ** (decade - 6)).tolist()
            values += middles + [-v for v in middles]
        return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def blocks_of(shape: tuple[int, ...], block: int) -> int:
    return -(-math.prod(shape) // block)


def decode_absmax(absmax: Tensor, nested: Nested | None, first: int = 0) -> Tensor:
    """float32 [blocks], of a weight's blocks from ``first`` on."""
    if nested is None:
        return absmax
    of_block = torch.arange(first, first + absmax.numel(), device=absmax.device) // OUTER_BLOCK
    outer = nested.absmax[of_block]
    return nested.code[absmax.int()] * outer + nested.offset


def decode(
    data: Tensor,
    tensors: list[Tensor],
    block: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    first: int = 0,
) -> Tensor:
    """The weight of ``shape``: ``code[q] * absmax`` in float32, rounded once to ``dtype``; in
    float64 exact. ``first``: where its values begin among those of the bytes."""
    code, absmax, *nested = tensors
    n = math.prod(shape)
    begin, end = first // block, -(-(first + n) // block)
    start = begin * block
    q = data.flatten()[start // 2 : -(-(first + n) // 2)]
    values = code[torch.stack([q >> 4, q & 15], dim=1).flatten().int()][first - start :][:n]
    scales = decode_absmax(absmax[begin:end], Nested(*nested) if nested else None, begin)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    each = scales.to(wide).repeat_interleave(block)[first - start :][:n]
    return (values.to(wide) * each).to(dtype).view(shape)


def base_weight(
    weight: Tensor,
    quant: Sequence[Tensor] | None,
    quant_block: int,
    n: int,
    k: int,
    fan_in_fan_out: bool,
    dtype: torch.dtype,
) -> Tensor:
    """W [N, K] in ``dtype``, of either orientation or of the bytes of a four-bit weight."""
    if quant is not None:
        shape = (k, n) if fan_in_fan_out else (n, k)
        weight = decode(weight, list(quant), quant_block, shape, dtype)
    return (weight.t() if fan_in_fan_out else weight).to(dtype)


def dequantize(
    data: Tensor, state: QuantState, dtype: torch.dtype | None = None, expert: int | None = None
) -> Tensor:
    """The weight of ``state.shape``, or that of one expert of them, in the dtype that it was
    quantised from or in ``dtype``."""
    shape = state.shape if expert is None else state.shape[1:]
    first = 0 if expert is None else expert * math.prod(shape)
    return decode(data, state.tensors(), state.block, shape, dtype or state.dtype, first)


@torch.no_grad()
def quantize(
    weight: Tensor, quant_type: str = "nf4", *, block: int = 64, double_quant: bool = True
) -> tuple[Tensor, QuantState]:
    """The bytes uint8 [ceil(N K / 2), 1] of ``weight`` [N, K], or of the experts [E, N, K], those
    of bitsandbytes on a CPU, and what they mean.

    Raises:
        ValueError: an unknown type or block size, or a weight that is not 2-D or 3-D, or empty.
        TypeError: a dtype other than float32, bfloat16, float16.
    """
    check_format(quant_type, block)
    if weight.dim() not in (2, 3) or weight.numel() == 0:
        raise ValueError(f"a weight [N, K] or [E, N, K] is quantised, not {list(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"float32, bfloat16 and float16 are quantised, not {weight.dtype}")
    code = code_of(quant_type, weight.device)
    stretches = [
        _quantize4(flat.float(), code, block) for flat in weight.reshape(-1).split(_STRETCH)
    ]
    data, absmax = (torch.cat(parts) for parts in zip(*stretches, strict=True))
    shape = tuple(weight.shape)
    if not double_quant:
        return data, QuantState(quant_type, shape, block, weight.dtype, absmax)
    offset = absmax.mean()
    q8, outer = _quantize8(absmax - offset)
    nested = Nested(code8_of(weight.device), outer, offset)
    return data, QuantState(quant_type, shape, block, weight.dtype, q8, nested)


# Values that are quantised at once, whole blocks of any size: what they take on the way is some ten
# times their memory.
_STRETCH = 1 << 22


def _quantize4(flat: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The bytes [ceil(n / 2), 1] of n values, and the absmax of every block."""
    n, whole = flat.numel(), flat.numel() // block * block
    parts = flat[:whole].view(-1, block)
    absmax = parts.abs().amax(dim=1)
    scaled = (parts * (1.0 / absmax.clamp(min=1e-38)).view(-1, 1)).clamp(-1, 1).view(-1)
    if whole < n:
        # The last block is divided, the others are multiplied by a reciprocal.
        last = flat[whole:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, last.view(1)])
        scaled = torch.cat([scaled, (flat[whole:] / last).clamp(-1, 1)])
    if n % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    order = code.argsort(stable=True)
    q = order.to(torch.uint8)[torch.bucketize(scaled, (code[order[:-1]] + code[order[1:]]) / 2)]
    return (q[::2] << 4 | q[1::2]).view(-1, 1), absmax


@functools.cache
def _nearest8(device: torch.device | str) -> Tensor:
    """The byte of the value of the map that is nearest to each of 65536 steps from -1 to 1."""
    with torch.inference_mode(False):
        code, steps = code8_of(device), torch.arange(65536, device=device).float() * 2 / 65535 - 1
        return torch.bucketize(steps, (code[1:] + code[:-1]) * 0.5).to(torch.uint8)


def _quantize8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of the dynamic map, by way of the nearest of 65536 steps, and the absmax of every block
    of 256."""
    n = values.numel()
    padded = torch.nn.functional.pad(values, (0, -n % OUTER_BLOCK)).view(-1, OUTER_BLOCK)
    absmax = padded.abs().amax(dim=1)
    part = (padded * (1.0 / absmax).view(-1, 1)).clamp(-1, 1).add(1.0).mul(0.5)
    # Multiplied and added with one rounding, as an FMA does.
    step = (part.double() * 65535 + 0.5).float().nan_to_num().int()
    q = torch.where(absmax.view(-1, 1) == 0, 0, _nearest8(values.device)[step])
    return q.view(-1)[:n], absmax


def check_format(quant_type: Any, block: Any) -> None:
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"a four-bit type is one of {', '.join(QUANT_TYPES)}, not {quant_type!r}")
    if block not in BLOCKS:
        raise ValueError(f"a block of a four-bit weight has one of {BLOCKS} values, not {block!r}")


def quant_state_of(weight: Any) -> QuantState | None:
    """What the bytes of ``weight`` mean, by its ``quant_state`` (ours or bitsandbytes'); None for a
    weight without one.

    Raises:
        ValueError: a state that does not fit the bytes, or one of another format.
    """
    held: Any = getattr(weight, "quant_state", None)
    if held is None:
        return None
    state = held if isinstance(held, QuantState) else _of_bitsandbytes(held)
    _check_fits(weight, state)
    return state


def _of_bitsandbytes(held: Any) -> QuantState:
    if getattr(held, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked this weight for its own CPU kernel, at a call of its layer "
            "in evaluation mode: load the model again, and adapt it before it is called"
        )
    check_format(held.quant_type, held.blocksize)
    nested = None
    if held.state2 is not None:
        if held.state2.blocksize != OUTER_BLOCK:
            raise ValueError(
                f"absmax is quantised in blocks of {held.state2.blocksize}, not of {OUTER_BLOCK}"
            )
        nested = Nested(held.state2.code, held.state2.absmax, held.offset)
    shape = tuple(held.shape or ())
    if len(shape) not in (2, 3):
        raise ValueError(f"a four-bit weight has two or three dimensions, this one {list(shape)}")
    return QuantState(held.quant_type, shape, held.blocksize, held.dtype, held.absmax, nested)


def _check_fits(weight: Tensor, state: QuantState) -> None:
    shape, absmax, nested = state.shape, state.absmax, state.nested
    n, blocks = math.prod(shape), blocks_of(shape, state.block)
    nbytes = weight.numel() * weight.element_size()
    if nbytes != (n + 1) // 2 or not weight.is_contiguous():
        raise ValueError(
            f"a four-bit weight {list(shape)} is {(n + 1) // 2} bytes in a row, not "
            f"{weight.dtype} {list(weight.shape)}"
        )
    expected = torch.float32 if nested is None else torch.uint8
    if absmax.numel() != blocks or absmax.dtype != expected:
        raise ValueError(
            f"absmax of a weight {list(shape)} in blocks of {state.block} is "
            f"{expected} [{blocks}], not {absmax.dtype} {list(absmax.shape)}"
        )
    if nested is not None and (
        nested.code.numel() != 256
        or nested.absmax.numel() != -(-blocks // OUTER_BLOCK)
        or any(t.dtype != torch.float32 for t in nested)
    ):
        raise ValueError(
            f"the absmax of absmax is float32 [{-(-blocks // OUTER_BLOCK)}], its code float32 "
            f"[256] and its offset float32, not {[(t.dtype, list(t.shape)) for t in nested]}"
        )


# The keys beside a weight's in a state_dict, as bitsandbytes writes them.
STATE_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def to_state_dict(state: QuantState) -> dict[str, Tensor]:
    """What a checkpoint of bitsandbytes holds beside the bytes, by the end of its keys."""
    more: dict[str, Any] = {
        "quant_type": state.quant_type,
        "blocksize": state.block,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    found = {"absmax": state.absmax, "quant_map": code_of(state.quant_type, state.absmax.device)}
    if state.nested is not None:
        found |= {"nested_absmax": state.nested.absmax, "nested_quant_map": state.nested.code}
        more |= {
            "nested_blocksize": OUTER_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": state.nested.offset.item(),
        }
    text = torch.tensor(list(json.dumps(more).encode()), dtype=torch.uint8)
    return found | {f"quant_state.bitsandbytes__{state.quant_type}": text}


def from_state_dict(found: dict[str, Tensor], device: torch.device | str) -> QuantState:
    """The state that :func:`to_state_dict`, or bitsandbytes, wrote.

    Raises:
        ValueError: a part is missing or says something else than a four-bit format.
    """
    texts = [t for key, t in found.items() if key.startswith("quant_state.bitsandbytes__")]
    if len(texts) != 1 or "absmax" not in found:
        raise ValueError(f"no state of a four-bit weight: there are {sorted(found)}")
    more = json.loads(bytes(texts[0].tolist()).decode())
    check_format(more["quant_type"], more["blocksize"])
    nested = None
    if "nested_offset" in more:
        offset = torch.tensor(more["nested_offset"], dtype=torch.float32)
        nested = Nested(found["nested_quant_map"], found["nested_absmax"], offset)
    dtype, shape = getattr(torch, more["dtype"]), tuple(more["shape"])
    state = QuantState(more["quant_type"], shape, more["blocksize"], dtype, found["absmax"], nested)
    return state.to(device)

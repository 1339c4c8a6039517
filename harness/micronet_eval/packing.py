"""Packed weights: every stored tensor bit by bit at its true width, in one safetensors file.

Layout (docs/format.md). Three tensors of bytes hold what the storage term of the score counts: `values` (codes, least
significant bit first, of some values only where a mask says which they are), `masks` (1 bit an element or a block) and
`overhead` (exponents, scales, zero points, tables). `structure` is zlib-compressed JSON: the layers that differ from
the registered architecture, the activation quantizers, and name, format and layout of each tensor. The header carries a
SHA-256 of all four.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from micronet_eval.dotted import FEWEST, MOST
from micronet_eval.errors import InputError
from micronet_eval.files import LARGEST, check_file, write_whole
from micronet_eval.formats import (
    ActivationQuantizer,
    Format,
    OffGrid,
    Plain,
    format_of,
    of_activations,
    of_weights,
)
from micronet_eval.graph import MOST_NUMBERS
from micronet_eval.masks import ELEMENT, Block, Mask, block_mask, elements, mask_shape
from micronet_eval.nonzeros import seen
from micronet_eval.storage import stored_tensors
from micronet_eval.structure import (
    QUANTIZERS,
    StructureError,
    accumulators_of,
    build_layer,
    changes,
    quantizers_of,
    replace,
    set_accumulators,
    set_quantizers,
    submodule,
    traced,
    without_weights,
)
from micronet_eval.trace import Example, Value, constant, trace

_KEY, _KIND = "micronet-packed", {"version": 1}
_STREAMS = ("values", "masks", "overhead", "structure")
_STRUCTURE_LIMIT = 64 << 20  # bytes of JSON; more is a decompression bomb
_MOST_ELEMENTS = 1 << 30  # of one tensor: a mask of 1 bit can claim any number of zeros

Layout = Annotated[str, StringConstraints(pattern=r"^(dense|bitmask|blocks:[1-9]\d{0,9}x[1-9]\d{0,9}|overhead|plain)$")]


class Structure(BaseModel):
    """What the file says beside the bits. `tensors` are (name, format, layout), in the order of the streams.

    `accumulators` are the bits that layers sum in where that are fewer than 32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    layers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    activations: dict[str, int | str] = Field(default_factory=dict)
    accumulators: dict[str, Annotated[int, Field(ge=FEWEST, le=MOST)]] = Field(default_factory=dict)
    tensors: list[tuple[str, str, Layout]]

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """No accumulators, no field: such files are written as they always were."""
        fields: dict[str, Any] = serialize(self)
        return fields if self.accumulators else {k: v for k, v in fields.items() if k != "accumulators"}


@dataclass(frozen=True)
class Packed:
    """A packed model in memory. `plain` holds tensors that the file carries unpacked, as ordinary safetensors."""

    structure: Structure
    streams: dict[str, NDArray[np.uint8]]
    plain: dict[str, Tensor]

    @property
    def bits(self) -> dict[str, int]:
        """Bytes of the counted streams, in bits: each at most 7 above what is counted."""
        return {name: 8 * self.streams[name].size for name in ("values", "masks", "overhead")}


# --- bits -------------------------------------------------------------------------------------------------------------

_FEW = 512  # codes that are read bit by bit, in fewer calls than whole words take
_CHUNK = 1 << 16  # codes at a time, so that they stay cached; a multiple of 8, so that every chunk ends on a byte


Codes = NDArray[np.int64] | NDArray[np.int32] | NDArray[np.int16] | NDArray[np.bool_]


def _dtype(width: int) -> Any:
    """Of codes that are read: the smaller, the fewer bytes go through memory."""
    return np.bool_ if width == 1 else np.int32 if width < 32 else np.int64


def _word(width: int) -> Any:
    """Of codes that are shifted: a byte of one never lies beyond it."""
    return np.uint32 if width <= 32 else np.uint64


def to_bytes(codes: Codes, width: int) -> NDArray[np.uint8]:
    """`codes` bit by bit, `width` each, least significant first; what is left of the last byte is 0."""
    if width == 1:
        return np.packbits(codes.astype(np.bool_), bitorder="little")
    groups = np.zeros((-(-codes.size // 8), 8), _word(width))
    groups.reshape(-1)[: codes.size] = codes
    packed = np.zeros((len(groups), width), np.uint8)  # eight codes begin and end on a byte
    for i in range(8):
        for byte in range(i * width // 8, -(-(i + 1) * width // 8)):
            shift = 8 * byte - i * width
            packed[:, byte] |= _shifted(groups[:, i], shift).astype(np.uint8)
    return packed.reshape(-1)[: -(-codes.size * width // 8)]


def from_bytes(data: NDArray[np.uint8], count: int, width: int) -> Codes:
    """The `count` codes that `to_bytes` made `data` of."""
    if width == 1:
        return np.unpackbits(data, count=count, bitorder="little").view(np.bool_)
    if count <= _FEW:  # most of what is read: exponents and biases
        bits = np.unpackbits(data, count=count * width, bitorder="little").reshape(count, width)
        codes: Codes = bits @ _powers(width)
        return codes
    packed = np.zeros((-(-count // 8), width), np.uint8)
    packed.reshape(-1)[: data.size] = data
    wide = _word(width)
    groups = np.empty((len(packed), 8), _dtype(width))
    for i in range(8):
        code = np.zeros(len(packed), wide)
        for byte in range(i * width // 8, -(-(i + 1) * width // 8)):
            code |= _shifted(packed[:, byte].astype(wide), i * width - 8 * byte)
        groups[:, i] = code & wide((1 << width) - 1)
    return groups.reshape(-1)[:count]


@cache
def _powers(width: int) -> NDArray[Any]:
    """What each bit of a code counts; the highest of 64 is the sign."""
    powers = np.uint64(1) << np.arange(width, dtype=np.uint64)
    counts: NDArray[Any] = powers.view(np.int64).astype(_dtype(width), copy=False)
    return counts


def _shifted(bits: NDArray[Any], right: int) -> NDArray[Any]:
    """Unsigned integers shifted to the right; to the left where that is negative."""
    shift = bits.dtype.type(abs(right))
    shifted: NDArray[Any] = bits >> shift if right >= 0 else bits << shift
    return shifted


class _BitWriter:
    """A stream of bits, in bytes, that grows by tensors, which may end inside of a byte."""

    def __init__(self) -> None:
        self.parts: list[NDArray[np.uint8]] = []
        self.last = np.zeros(1, np.uint8)  # the byte that is not full
        self.used = 0  # bits of it

    def write(self, codes: Codes, width: int) -> None:
        for start in range(0, codes.size, _CHUNK):
            chunk = codes[start : start + _CHUNK]
            packed = to_bytes(chunk, width)
            if self.used:
                moved = np.append(self.last, packed >> np.uint8(8 - self.used))
                moved[:-1] |= packed << np.uint8(self.used)
                packed = moved
            whole, self.used = divmod(self.used + chunk.size * width, 8)
            self.parts.append(packed[:whole])
            self.last = packed[whole : whole + 1] if self.used else np.zeros(1, np.uint8)

    def bytes(self) -> NDArray[np.uint8]:
        return np.concatenate([*self.parts, self.last[: self.used > 0]])


class _BitReader:
    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data
        self.position = 0

    def read(self, count: int, width: int) -> Codes:
        if self.position + count * width > 8 * self.data.size:
            raise OffGrid("the data ends too early")
        codes: Codes = np.empty(count, _dtype(width))
        for start in range(0, count, _CHUNK):
            n = min(_CHUNK, count - start)
            first, skip = divmod(self.position, 8)
            last = -(-(self.position + n * width) // 8)
            data = self.data[first:last]
            if skip:
                data = (data >> np.uint8(skip)) | np.append(data[1:] << np.uint8(8 - skip), np.uint8(0))
            codes[start : start + n] = from_bytes(data[: -(-n * width // 8)], n, width)
            self.position += n * width
        return codes

    def finish(self) -> None:
        """Raises OffGrid where more than the padding of the last byte is left, or the padding is not zero."""
        left = 8 * self.data.size - self.position
        if left >= 8 or (left and self.data[-1] >> (8 - left)):
            raise OffGrid("there is more data than the tensors take")


# --- model <-> packed -------------------------------------------------------------------------------------------------


def pack(model: nn.Module, architecture: nn.Module, example_input: Example) -> Packed:
    """Packs what `model` stores; `architecture` is the registered model that it was made from.

    Raises InputError where a tensor is not finite or off its grid, or the structure cannot be described.
    """
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise InputError("cannot pack the model: it has batch norm, whose statistics are no weights; merge it first")
    values, masks, overhead = _BitWriter(), _BitWriter(), _BitWriter()
    tensors: list[tuple[str, str, Layout]] = []
    names: set[str] = set()
    for stored in stored_tensors(trace(model, example_input)):
        layout: Layout
        if stored.in_code:
            continue  # the architecture makes it again
        tensor = _tensor(model, stored.name)
        if tensor is None:
            raise InputError(f"cannot pack {stored.name!r}: it is no parameter or buffer of the model")
        if not _same(tensor, stored.tensor):
            raise InputError(f"cannot pack {stored.name!r}: the model computes with something else that it makes of it")
        if stored.name in names:
            raise InputError(
                f"cannot pack {stored.name!r}: layers share it, each by a mask or quantizer of its own; let them share "
                "that, too"
            )
        names.add(stored.name)
        codes = _codes(stored.name, stored.value, stored.format)
        block = stored.mask(stored.format.code_bits, stored.format)
        width = stored.format.code_bits
        if stored.is_overhead:
            layout = "overhead"
            overhead.write(codes.reshape(-1), width)
        elif block is None:
            layout = "dense"
            values.write(codes.reshape(-1), width)
        else:
            layout = "bitmask" if block == ELEMENT else f"blocks:{block[0]}x{block[1]}"
            mask = block_mask(stored.is_nonzero, block)
            masks.write(mask.reshape(-1), 1)
            for piece, kept in _pieces(codes, elements(mask, block, codes.shape)):
                values.write(piece.take(kept), width)
        for column, bits in stored.format.side:
            overhead.write(column.reshape(-1).numpy(), bits)
        tensors.append((stored.name, stored.format.spec, layout))
    try:
        quantizers = quantizers_of(model)
        if lacking := _lacking(quantizers, names):
            raise StructureError(f"no operation on an activation reads {lacking[0]!r}; remove its quantizer")
        structure = Structure(
            layers=changes(architecture, model),
            activations={name: quantizer.declared for name, quantizer in quantizers.items()},
            accumulators=accumulators_of(model),
            tensors=tensors,
        )
    except StructureError as error:
        raise InputError(f"cannot pack the model: {error}") from error
    streams = {"values": values.bytes(), "masks": masks.bytes(), "overhead": overhead.bytes()}
    return Packed(structure, streams, {})


def unpack(packed: Packed, architecture: nn.Module) -> nn.Module:
    """The model that was packed, built in the place of `architecture` (whose weights may lie on the meta device).

    Weights come back value for value; fixed-point weights under a quantizing parametrization, so that the format is
    part of what runs. Raises InputError where the file does not fit the architecture or itself.
    """
    structure, model = packed.structure, architecture
    try:
        if len(numbers := set(_numbers(list(structure.layers.values())))) > MOST_NUMBERS:
            told = f"layers with {len(numbers)} numbers, such as eps, that are not counted"
            raise StructureError(f"{told}; at most {MOST_NUMBERS} are possible")
        for path, description in structure.layers.items():
            with without_weights():
                replace(model, path, build_layer(description))
        if structure.activations:
            model = traced(model)
            quantizers = {name: of_activations(declared) for name, declared in structure.activations.items()}
            set_quantizers(model, quantizers)
            if lacking := _lacking(quantizers, {name for name, *_ in structure.tensors}):
                raise OffGrid(f"tensor {lacking[0]!r} is missing; a quantizer needs it")
        readers = {name: _BitReader(packed.streams[name]) for name in ("values", "masks", "overhead")}
        if twice := [name for name, n in Counter(name for name, *_ in structure.tensors).items() if n > 1]:
            raise OffGrid(f"tensor {twice[0]!r} is there twice")
        places = _places(model)
        for name, spec, layout in structure.tensors:
            _assign(model, places, name, *_read_tensor(packed, readers, model, name, spec, layout))
        for reader in readers.values():
            reader.finish()
        if structure.accumulators:
            model = traced(model)
            set_accumulators(model, structure.accumulators)
    except RecursionError as error:
        raise InputError("the weights do not fit: a layer is nested too deep") from error
    except (OffGrid, StructureError, OverflowError) as error:  # the last of a number in a description of layers
        raise InputError(f"the weights do not fit: {error}") from error
    return model


def _numbers(description: Any) -> Iterator[float]:
    """The numbers in a description of layers that are no sizes."""
    if isinstance(description, dict):
        for name, value in description.items():
            if name == "layers":
                yield from _numbers(value)
            elif isinstance(value, float) or (name in ("eps", "momentum") and isinstance(value, int)):
                yield float(value)
    elif isinstance(description, list):
        for layer in description:
            yield from _numbers(layer)


def _same(parameter: Tensor, used: Tensor) -> bool:
    """Whether what is used is the parameter itself, bit for bit: NaN, too, whose refusal has a message of its own."""
    alike = parameter.numel() == used.numel() and parameter.dtype == used.dtype
    return alike and torch.equal(_bits(parameter), _bits(used))


def _bits(tensor: Tensor) -> Tensor:
    """The elements in a row, as integers of the same size."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().reshape(-1).view(integers[tensor.dtype.itemsize])


def _pieces(codes: Codes, kept: Mask) -> Iterator[tuple[Codes, NDArray[np.int64]]]:
    """Both a piece at a time, and of what is kept the places: to take by places is several times faster."""
    codes, kept = codes.reshape(-1), kept.reshape(-1)
    for start in range(0, codes.size, _CHUNK):
        yield codes[start : start + _CHUNK], np.flatnonzero(kept[start : start + _CHUNK])


def _codes(name: str, value: Value, number_format: Format) -> Codes:
    if not value.seen.finite:
        raise InputError(f"tensor {name!r} holds NaN or infinity")
    assert value.data is not None
    try:
        codes: Codes = number_format.encode(value.data.cpu()).numpy()
        return codes
    except OffGrid as error:
        raise InputError(f"tensor {name!r}: {error}") from error


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    """A parameter, quantized where it is, or a buffer."""
    path, _, attribute = name.rpartition(".")
    owner = submodule(model, path)
    tensor = None if owner is None else getattr(owner, attribute, None)
    return tensor if isinstance(tensor, Tensor) else None


def _read_tensor(
    packed: Packed, readers: dict[str, _BitReader], model: nn.Module, name: str, spec: str, layout: Layout
) -> tuple[Tensor, Format]:
    place = None if "parametrizations" in name.split(".") else _tensor(model, name)
    if place is None:
        raise OffGrid(f"tensor {name!r} has no place in the architecture")
    shape = place.shape
    side = readers["overhead"]
    if shape.numel() > _MOST_ELEMENTS:
        raise OffGrid(f"tensor {name!r} has {shape.numel():,} elements; at most {_MOST_ELEMENTS:,} are read")

    def read_side(count: int, width: int) -> Tensor:
        return torch.from_numpy(side.read(count, width)).to(torch.int64)

    if layout == "plain":
        tensor = packed.plain.get(name)
        if tensor is None or tensor.shape != shape:
            raise OffGrid(f"tensor {name!r} is missing from the file, or is not of shape {tuple(shape)}")
        number_format = format_of(spec, shape, read_side)
        try:
            Plain.of(tensor.dtype)  # raises OffGrid for complex numbers
            value = number_format.decode(torch.from_numpy(_codes(name, constant(tensor), number_format)))
        except (OffGrid, RuntimeError) as error:  # 8-bit floats are not compared with others
            raise OffGrid(f"tensor {name!r} of {tensor.dtype} is no {spec}: {error}") from error
        if value.dtype != tensor.dtype or not torch.equal(value, tensor):
            raise OffGrid(f"tensor {name!r} of {tensor.dtype} has values that {spec} does not have")
    elif layout == "overhead":
        number_format = format_of(spec, shape, read_side)
        value = number_format.decode(read_side(int(np.prod(shape)), number_format.code_bits).reshape(shape))
    else:
        number_format = format_of(spec, shape, read_side)
        kept = None if layout == "dense" else _read_mask(readers["masks"], shape, layout)
        count = shape.numel() if kept is None else int(np.count_nonzero(kept))
        codes = readers["values"].read(count, number_format.code_bits)
        if kept is not None:
            codes = _spread(codes, kept)
        value = number_format.decode(torch.from_numpy(codes).view(shape))
        if kept is not None and not number_format.holds_zero:
            value.masked_fill_(~torch.from_numpy(kept), 0)
        if layout == "bitmask" and seen(value).nonzeros != count:
            raise OffGrid(f"tensor {name!r}: the bitmask names a value that is zero")
    if not seen(value).finite:
        raise OffGrid(f"tensor {name!r} holds NaN or infinity")
    return value, number_format


def _spread(codes: Codes, kept: Mask) -> Codes:
    """The codes at the places of what is kept, and 0 elsewhere."""
    spread: Codes = np.zeros(kept.size, codes.dtype)
    done = 0
    for piece, places in _pieces(spread, kept):
        piece[places] = codes[done : done + places.size]
        done += places.size
    return spread


def _read_mask(reader: _BitReader, shape: torch.Size, layout: Layout) -> Mask:
    """Which elements of a tensor are in the file."""
    rows, columns = layout.removeprefix("blocks:").split("x") if layout != "bitmask" else ELEMENT
    block: Block = int(rows), int(columns)
    matrix = mask_shape(shape, ELEMENT)
    if block != ELEMENT and (block[0] > matrix[0] or block[1] > matrix[1]):
        raise OffGrid(f"blocks of {rows} x {columns} are larger than a tensor of shape {tuple(shape)}")
    blocks = mask_shape(shape, block)
    return elements(reader.read(blocks[0] * blocks[1], 1).reshape(blocks).view(np.bool_), block, shape)


def _lacking(quantizers: Mapping[str, ActivationQuantizer], names: Container[str]) -> list[str]:
    """The tensors of quantizers of activations, by the nodes that they follow, that are not among those of a file."""
    own = (f"{QUANTIZERS}.{node}.{name}" for node, q in quantizers.items() for name, _ in q.named_buffers())
    return [name for name in own if name not in names]


_Places = dict[int, list[tuple[nn.Module, str]]]
"""The id of a parameter -> every module that has it, and its name there."""


def _places(model: nn.Module) -> _Places:
    places: _Places = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, key))
    return places


def _assign(model: nn.Module, places: _Places, name: str, value: Tensor, number_format: Format) -> None:
    """Sets a tensor at its place, and at every other place where the architecture has the same tensor."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    place = owner._buffers.get(attribute, owner._parameters.get(attribute))
    if place is not None and value.dtype != place.dtype:
        raise OffGrid(f"tensor {name!r} is {number_format.spec}, but {place.dtype} in the architecture")
    if attribute in owner._buffers:
        owner._buffers[attribute] = value
        if isinstance(owner, ActivationQuantizer):
            owner.check()
        return
    old, new = owner._parameters.get(attribute), nn.Parameter(value, requires_grad=value.is_floating_point())
    if old is None:  # tied to one that was there before
        raise OffGrid(f"tensor {name!r} is there twice")
    try:
        quantizer = of_weights(number_format)
    except OffGrid as error:
        raise OffGrid(f"tensor {name!r}: {error}") from error
    tied = places[id(new)] = places.pop(id(old))
    for module, key in tied:
        module._parameters[key] = new
        if quantizer is not None:
            parametrize.register_parametrization(module, key, quantizer, unsafe=True)


# --- packed <-> file --------------------------------------------------------------------------------------------------


def write(packed: Packed, path: Path) -> None:
    """Writes the file whole or not at all."""
    write_whole(path, file_bytes(packed))


def file_bytes(packed: Packed) -> bytes:
    """What the file holds; the same model gives the same bytes."""
    text = packed.structure.model_dump_json().encode()
    streams = {**packed.streams, "structure": np.frombuffer(zlib.compress(text, 9), np.uint8)}
    tensors = {name: torch.from_numpy(stream.copy()) for name, stream in streams.items()}
    return save({**tensors, **packed.plain}, metadata=_metadata(streams, packed.plain))


def read(path: Path) -> Packed:
    """Reads a packed file. Raises InputError where it is missing, truncated, changed, or of another kind."""
    try:
        check_file(path, LARGEST)
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise InputError(
                    f"{path} is a safetensors file, but no packed model; write it with `micronet-eval compress`"
                )
            names = set(file.keys())
            if missing := [name for name in _STREAMS if name not in names]:
                raise InputError(f"{path}: the packed model lacks {', '.join(missing)}")
            if any(file.get_slice(name).get_dtype() != "U8" for name in _STREAMS):
                raise InputError(f"{path}: the streams {', '.join(_STREAMS)} must be bytes")
            streams = {name: file.get_tensor(name) for name in _STREAMS}
        with safe_open(path, framework="pt") as file:
            plain = {name: file.get_tensor(name) for name in sorted(names - set(_STREAMS))}
    except FileNotFoundError:
        raise InputError(f"{path} is missing: a submission needs its packed weights") from None
    except (SafetensorError, OSError, MemoryError, TypeError, ValueError) as error:  # the last two of absurd shapes
        why = str(error).partition("\n")[0]
        raise InputError(f"{path} is no readable safetensors file (truncated or damaged?): {why}") from error
    if any(stream.ndim != 1 for stream in streams.values()):
        raise InputError(f"{path}: the streams {', '.join(_STREAMS)} must be bytes in a row")
    if metadata != _metadata(streams, plain):
        raise InputError(f"{path}: version or checksum do not match the contents; the file was damaged or changed")
    structure = _structure(path, streams.pop("structure"))
    if extra := sorted(set(plain) - {name for name, _, layout in structure.tensors if layout == "plain"}):
        raise InputError(f"{path}: the structure does not list tensor {extra[0]!r}; remove it")
    return Packed(structure, streams, plain)


def _metadata(streams: dict[str, NDArray[np.uint8]], plain: dict[str, Tensor]) -> dict[str, str]:
    """One key only: safetensors writes several in an order that changes from run to run."""
    digest = hashlib.sha256()
    for data in (*(streams[name] for name in _STREAMS), *(_bits(plain[name]).numpy() for name in sorted(plain))):
        digest.update(data.nbytes.to_bytes(8, "little"))
        digest.update(data.data)
    return {_KEY: json.dumps({**_KIND, "sha256": digest.hexdigest()})}


def _structure(path: Path, compressed: NDArray[np.uint8]) -> Structure:
    try:
        decompressor = zlib.decompressobj()
        text = decompressor.decompress(compressed.tobytes(), _STRUCTURE_LIMIT)
        if decompressor.unconsumed_tail:
            raise InputError(f"{path}: the structure is larger than {_STRUCTURE_LIMIT >> 20} MiB")
        if decompressor.unused_data or not decompressor.eof:
            raise ValueError("it is not one whole stream of zlib")
        return Structure.model_validate(json.loads(text))
    except (zlib.error, ValueError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise InputError(f"{path}: the structure cannot be read: {reason}") from error

"""Encode frozen dataclasses as JSON and arrays, and decode them; decoding creates only instances of listed classes.

Arrays become {"array": index}, tuples {"tuple": [...]}, dicts {"dict": [[key, value], ...]}, dataclasses
{"Name": {field: value}}, a ModelProto {"model": [...]}: the model without initializers, then each initializer.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.model.protos import without_initializers

_PLAIN = (str, int, float, bool, type(None))

Array = NDArray[Any]
Arrays = list[Array]
Classes = Mapping[str, type[Any]]  # by name


def encode(value: Any, arrays: Arrays, classes: Classes) -> Any:
    """Encode `value` as a JSON tree; append its arrays to `arrays`. Raises TypeError for a class not in `classes`."""
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        return {"tuple": [encode(item, arrays, classes) for item in value]}
    if type(value).__name__ in classes:
        fields = {f.name: encode(getattr(value, f.name), arrays, classes) for f in dataclasses.fields(value)}
        return {type(value).__name__: fields}
    if isinstance(value, Mapping):
        return {"dict": [[encode(k, arrays, classes), encode(v, arrays, classes)] for k, v in value.items()]}
    if isinstance(value, onnx.ModelProto):
        return {"model": [encode(_bytes(part), arrays, classes) for part in model_parts(value)]}
    raise TypeError(f"no encoding for {type(value).__name__}")


def decode(tree: Any, arrays: Arrays, classes: Classes) -> Any:
    """Invert `encode`. Raises KeyError, IndexError, TypeError or ValueError on any other tree."""
    if isinstance(tree, _PLAIN):
        return tree
    ((kind, content),) = tree.items()
    if kind == "array":
        return arrays[content]
    if kind == "tuple":
        return tuple(decode(item, arrays, classes) for item in content)
    if kind == "dict":
        return {decode(k, arrays, classes): decode(v, arrays, classes) for k, v in content}
    if kind == "model":
        return _joined([decode(part, arrays, classes).tobytes() for part in content])
    return classes[kind](**{name: decode(value, arrays, classes) for name, value in content.items()})


def packed(arrays: Arrays) -> tuple[list[Any], dict[str, Array]]:
    """Return the place of each array, (dtype, first element, shape, order), and the members by dtype."""
    places: list[Any] = []
    parts: dict[str, list[Array]] = {}
    ends: dict[str, int] = {}
    for array in arrays:
        order: Literal["C", "F"] = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        kind = array.dtype.str[1:]
        places.append((kind, ends.get(kind, 0), array.shape, order))
        parts.setdefault(kind, []).append(array.ravel(order))
        ends[kind] = ends.get(kind, 0) + array.size
    return places, {kind: np.concatenate(pieces) for kind, pieces in parts.items()}


def unpacked(places: Sequence[Any], members: Mapping[str, Array]) -> Arrays:
    """Invert `packed`; raises KeyError, TypeError or ValueError on any other places."""
    return [
        members[kind][first : first + math.prod(shape)].reshape(shape, order=order)
        for kind, first, shape, order in places
    ]


def model_parts(model: onnx.ModelProto) -> Iterator[bytes]:
    """Serialize the model without its initializers, then each of these: no part reaches protobuf's 2 GiB limit."""
    for part in (without_initializers(model), *model.graph.initializer):
        yield part.SerializeToString(deterministic=True)


def _joined(parts: list[bytes]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(parts[0])
        for part in parts[1:]:
            model.graph.initializer.add().ParseFromString(part)
    except Exception as error:  # protobuf's DecodeError is untyped
        raise ValueError("is not a model") from error
    return model


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)

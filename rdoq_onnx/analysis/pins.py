"""Check pins against the layers and tensors of a network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.patterns import channel_range, matches, suggestion
from rdoq_onnx.errors import ConfigError


@dataclass(frozen=True)
class _Pinned:
    """What a pin can fix: a layer, or a tensor (channels 0), under any of its names."""

    names: tuple[str, ...]
    channels: int = 0


@dataclass(frozen=True)
class _Part:
    """The channels that the pin `option` fixes at a width; all of a tensor count for one."""

    option: str
    bits: int
    channels: range


def check_pins(network: Network, pins: Sequence[tuple[str, int]]) -> None:
    """Raise ConfigError for a pin that matches nothing, exceeds a layer's channels or contradicts another pin."""
    targets = list(_targets(network))
    fixed: list[list[_Part]] = [[] for _ in targets]
    for pattern, bits in pins:
        name, channels = channel_range(pattern)
        eligible = [k for k, t in enumerate(targets) if t.channels or channels is None]
        matching = [k for k in eligible if matches(name, targets[k].names)]
        if not matching:
            hint = suggestion(name, [n for k in eligible for n in targets[k].names])
            raise ConfigError(f"--pin {pattern}={bits} matches no layer or activation{hint}")
        for k in matching:
            part = _Part(f"--pin {pattern}={bits}", bits, _range(f"--pin {pattern}={bits}", targets[k], channels))
            _check_agreement(targets[k], part, fixed[k])
            fixed[k].append(part)


def _targets(network: Network) -> Iterator[_Pinned]:
    for layer in network.searched:
        yield _Pinned(network.names(layer), layer.linear.channels)
    for activation in network.activations:
        yield _Pinned(activation.names)


def _range(option: str, target: _Pinned, channels: slice | None) -> range:
    if channels is None:
        return range(target.channels or 1)
    first, last = channels.start or 0, target.channels if channels.stop is None else channels.stop
    if not first < last <= target.channels:
        raise ConfigError(
            f"{option}: {target.names[0]!r} has no such channels; give a range within [0:{target.channels}]"
        )
    return range(first, last)


def _check_agreement(target: _Pinned, part: _Part, others: Sequence[_Part]) -> None:
    for other in others:
        first, last = max(part.channels[0], other.channels[0]), min(part.channels[-1], other.channels[-1])
        if other.bits != part.bits and first <= last:
            both = (
                f"{target.names[0]!r}" if not target.channels else f"channels {first} to {last} of {target.names[0]!r}"
            )
            raise ConfigError(f"{other.option} and {part.option} both fix {both}; give one width")

"""Find tables that are also the weight of a layer, as an embedding and the head of a language model often are."""

from dataclasses import replace

import numpy as np

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.skips import Finiteness, not_finite
from rdoq_onnx.model.layers import Layer, Tie


def tied(network: Network, finiteness: Finiteness = not_finite) -> Network:
    """Tie each table of `network` to the layer whose rows it equals: both get one set of integers, stored once.

    finiteness: as of the analysis; unless it is `not_finite`, no weights are read and nothing is tied.
    """
    if finiteness is not not_finite:
        return network
    ties = [Tie(table, layer.name) for table in network.stored if (layer := _equal(table, network)) is not None]
    tables = {tie.table.name for tie in ties}
    return replace(network, stored=tuple(x for x in network.stored if x.name not in tables), ties=tuple(ties))


def untied(network: Network) -> Network:
    """Return to the search the tables whose layer `network` no longer has."""
    layers = {layer.name for layer in network.layers}
    alone = tuple(tie.table for tie in network.ties if tie.layer not in layers)
    ties = tuple(tie for tie in network.ties if tie.layer in layers)
    return replace(network, stored=(*network.stored, *alone), ties=ties)


def _equal(table: Layer, network: Network) -> Layer | None:
    """Return the layer whose channels are the rows of `table`."""
    if not table.looked_up or len(table.linear.shape) != 2:
        return None
    alike = (x for x in network.layers if (x.linear.channels, x.linear.inputs) == table.linear.shape)
    rows = network.rows(table)
    return next((x for x in alike if x.linear.group == 1 and np.array_equal(network.rows(x), rows)), None)

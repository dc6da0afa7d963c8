"""Count the multiplications of each node for one sample.

Every weight of a layer is applied once at each position, so a layer takes K · P · channels of them; a product of
[.., M, K] and [.., K, N] takes (elements of the result) · K.
"""

import math
from collections.abc import Mapping

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.model.layers import Layer, Product, Use


def multiplications(network: Network, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return those of each node of the searched weights, and of each product.

    sizes: elements of each tensor per sample. Looking up rows of a table takes none; the weights of a recurrent cell,
    and others that no product unfolds, count as applied once.
    """
    work = {use.node: _of_use(layer, use, sizes) for layer in network.searched for use in layer.uses}
    if network.products:
        last = network.last_axes
        work |= {p.node: _of_product(p, sizes, last) for p in network.products}
    return work


def _of_use(layer: Layer, use: Use, sizes: Mapping[str, int]) -> int:
    weights = math.prod(layer.linear.shape)
    if layer.linear.op_type == "Gather":
        return 0
    if not use.output:
        return weights
    if layer.linear.op_type == "ConvTranspose":  # each input position meets each weight
        return sizes[use.data] // layer.linear.shape[0] * weights
    return use.linear.positions(sizes[use.output]) * weights


def _of_product(product: Product, sizes: Mapping[str, int], last: Mapping[str, int]) -> int:
    """K is the last axis of the left operand; N, that of the right one, tells it as well."""
    left, right = product.operands
    if left in last:
        return sizes[product.output] * last[left]
    return sizes.get(left, sizes[product.output]) * last.get(right, 1)

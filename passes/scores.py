"""Reading an eager attention around its softmax: the linear form above it, the product with values below it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from zsmerge_compile.errors import UnsupportedGraphError, must
from zsmerge_compile.passes.graph import arguments, aten_name, constant, hides, same_shape, value, where

CASTS = ("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "lift_fresh_copy")
_SHAPES = ("view", "reshape", "_unsafe_view", "expand", "squeeze", "unsqueeze", "flatten")
_PRODUCTS = ("matmul", "bmm")


@dataclass
class Scores:
    """scale * query @ key_transposed + sum of factor * term, where every condition lets a key be seen."""

    query: fx.Node
    key_transposed: fx.Node
    scale: float = 1.0
    terms: list[tuple[fx.Node, float]] = field(default_factory=list)
    conditions: list[tuple[fx.Node, bool]] = field(default_factory=list)  # (bool mask, whether True hides)


@dataclass(frozen=True)
class Below:
    """The product of attention weights with values."""

    product: fx.Node
    values: fx.Node


def uncast(node: fx.Node) -> fx.Node:
    """The node that `node` copies into a wider floating-point type, or else `node` itself."""
    while aten_name(node) in CASTS and isinstance(source := node.args[0], fx.Node):
        if not value(source).is_floating_point() or value(source).dtype.itemsize >= value(node).dtype.itemsize:
            break
        node = source
    return node


def product_below(softmax: fx.Node) -> Below | None:
    """Follow the weights to their one product with values; None if they are used in any other way."""
    node = softmax
    while len(node.users) == 1:
        (user,) = node.users
        if aten_name(user) in _PRODUCTS:
            weights, values = user.args[:2]
            return Below(user, values) if weights is node and isinstance(values, fx.Node) else None
        if not _passes(user) or user.args[0] is not node:
            return None
        node = user
    return None


def read_scores(gm: fx.GraphModule, node: Any, softmax: fx.Node) -> Scores | None:
    """The linear form that `node`, the input of `softmax`, computes; None if it holds no product of two activations.

    Raises UnsupportedGraphError if there is one, but something stands between it and the softmax that is not linear.
    """
    scores = _read(gm, node)
    if scores is None and (between := _between(node)) is not None:
        what = "what stands between q @ k^T and its softmax"
        expected = "scaling, masking or a cast"
        raise UnsupportedGraphError(must(what, expected, where(between), f"softmax {where(softmax)}"))
    return scores


def _read(gm: fx.GraphModule, node: Any) -> Scores | None:
    if not isinstance(node, fx.Node):
        return None
    name = aten_name(node)
    if name in _PRODUCTS:
        return _product(node)
    if _passes(node):
        return _read(gm, node.args[0])
    if name in ("mul", "div"):
        return _scaled(gm, node, name)
    if name in ("add", "sub", "rsub"):
        return _shifted(gm, node, name)
    if name == "masked_fill":
        given = arguments(node)
        return _filled(_read(gm, given["self"]), given["mask"], constant(gm, given["value"]), True)
    if name == "where" and len(node.args) == 3:
        condition, first, second = node.args
        seen = _filled(_read(gm, first), condition, constant(gm, second), False)
        return seen or _filled(_read(gm, second), condition, constant(gm, first), True)
    return None


def _product(node: fx.Node) -> Scores | None:
    """q @ k^T: both operands computed from tokens, with heads and both lengths kept apart."""
    query, key = node.args[:2]
    if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
        return None
    return Scores(query, key) if value(query).dim() == value(key).dim() == 4 else None


def _scaled(gm: fx.GraphModule, node: fx.Node, name: str) -> Scores | None:
    left, right = node.args[:2]
    if "rounding_mode" in node.kwargs:
        return None
    if name == "mul" and (number := constant(gm, left)) is not None:
        left, right = right, left
    else:
        number = constant(gm, right)
    scores = None if number is None or number <= 0 else _read(gm, left)
    if scores is None or number is None:
        return None
    factor = number if name == "mul" else 1.0 / number
    scores.scale *= factor
    scores.terms = [(term, weight * factor) for term, weight in scores.terms]
    return scores


def _shifted(gm: fx.GraphModule, node: fx.Node, name: str) -> Scores | None:
    """scores + term or term + scores; scores - term. `alpha` multiplies the second operand."""
    if name == "rsub":
        return None
    given = arguments(node)
    left, right, alpha = given["self"], given["other"], constant(gm, given["alpha"])
    if alpha is None:
        return None
    factor = alpha if name == "add" else -alpha
    scores = _read(gm, left)
    if scores is None and factor == 1.0:
        left, right = right, left
        scores = _read(gm, left)
    if scores is None:
        return None
    if constant(gm, right) is None:  # a number added to every logit changes no weight
        scores.terms.append((right, factor))
    return scores


def _filled(scores: Scores | None, condition: Any, number: float | None, hidden: bool) -> Scores | None:
    if scores is None or not hides(number):
        return None
    scores.conditions.append((condition, hidden))
    return scores


def _passes(node: fx.Node) -> bool:
    """Whether a node hands its first input on unchanged: a cast, a dropout that drops nothing, a reshape to itself."""
    name = aten_name(node)
    if name in ("dropout", "native_dropout", "feature_dropout"):
        _, probability, training = node.args[:3]
        if training and probability != 0.0:
            raise UnsupportedGraphError(must("attention dropout", "0", probability, where(node)))
        return name != "native_dropout"
    if name in _SHAPES:
        return same_shape(node, node.args[0])  # type: ignore[arg-type]
    return name in CASTS


def _between(node: Any) -> fx.Node | None:
    """The first node above a softmax that `_read` could not follow although a 4-D product lies above it."""
    while isinstance(node, fx.Node):
        inputs = [used for used in node.all_input_nodes if _has_product(used)]
        if aten_name(node) in _PRODUCTS or len(inputs) != 1:
            return None if aten_name(node) in _PRODUCTS or not inputs else node
        if not _passes(node) and aten_name(node) not in ("mul", "div", "add", "sub", "masked_fill", "where"):
            return node
        node = inputs[0]
    return None


def _has_product(node: fx.Node) -> bool:
    """Whether a 4-D product lies above through nodes of the same shape."""
    while True:
        if aten_name(node) in _PRODUCTS:
            return value(node).dim() == 4
        above = [used for used in node.all_input_nodes if _is_tensor(used) and same_shape(used, node)]
        if len(above) != 1:
            return False
        node = above[0]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)

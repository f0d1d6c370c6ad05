"""How many channels the maps have that a layer reads which does not say so itself.

Padding, pooling and scaling by a number fit any map. What stands around them knows its width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from orepa_compiler.algebra.layers import linear_part
from orepa_compiler.algebra.operators import ConvOperator, identity
from orepa_compiler.analysis.functional import conv_called, functional_conv
from orepa_compiler.capture import Call
from orepa_compiler.errors import NotLinear

if TYPE_CHECKING:
    from orepa_compiler.analysis.linear import Linear
    from orepa_compiler.analysis.regions import Interpreter


def identity_before(
    interpreter: Interpreter,
    operand: fx.Node,
    values: dict[fx.Node, Linear],
    through: fx.Node | str,
) -> ConvOperator:
    """The operator that does nothing to maps like the operand.

    Their width is that of the operand's value. Where it has none, it is what another reader of the
    operand asks for, or what reads the node that the maps go `through` unchanged in width (or the
    path of the module that it calls), also outside of a module that does no more than this.
    Raises NotLinear where nothing tells.
    """
    if found := _told(interpreter, operand, values, through):
        return found
    owner = interpreter.owner_of(operand)
    known = {} if owner is None or interpreter.is_open(owner) else interpreter.values(owner)
    if found := _told(interpreter, operand, known, through):
        return found
    raise NotLinear("the number of channels that it sees is not known")


def _told(
    interpreter: Interpreter,
    operand: fx.Node,
    values: dict[fx.Node, Linear],
    through: fx.Node | str,
) -> ConvOperator | None:
    before = values.get(operand)
    if before and (op := before.operator):
        return identity(op.out_channels, op.rank, like=op.weight)
    if isinstance(through, str):
        calls = [u for u in operand.users if f".{through}".endswith(f".{u.target}")]
        through = calls[0] if calls else operand
    for user in (*operand.users, *through.users):
        known = values.get(user)
        is_known = known is not None and known.source is operand
        op = known.operator if known and is_known else _reader(interpreter, user)
        if user is not through and op:
            return identity(op.in_channels, op.rank, like=op.weight)
    outside = _outside(interpreter, operand, through)
    return _told(interpreter, outside[0], {}, outside[1]) if outside else None


def _outside(
    interpreter: Interpreter, operand: fx.Node, through: fx.Node
) -> tuple[fx.Node, fx.Node] | None:
    """The operand and the node in the forward that calls this one, if this one does no more."""
    capture, owner = interpreter.capture, interpreter.owner_of(operand)
    calls = capture.calls.get(owner, []) if owner else []
    is_all = operand.op == "placeholder" and [u.op for u in through.users] == ["output"]
    if not is_all or len(calls) != 1 or len(calls[0].node.args) != 1:
        return None
    source = calls[0].node.args[0]
    interpreter.graph(calls[0].owner)  # so that its nodes are known by their owner
    return (source, calls[0].node) if isinstance(source, fx.Node) else None


def _reader(interpreter: Interpreter, node: fx.Node) -> ConvOperator | None:
    """The operator of a conv or norm that a node calls, which knows the width of what it reads."""
    owner = interpreter.owner_of(node)
    if owner is not None and functional_conv(node):
        return conv_called(node, lambda argument: interpreter.constant(owner, argument))
    if owner is None or node.op != "call_module":
        return None
    path = interpreter.capture.path_of(Call(owner, node))
    try:
        return linear_part(interpreter.read(path))[0]
    except NotLinear:
        whole = None if interpreter.is_open(path) else interpreter.whole(path)
        return whole.operator if whole else None

"""Re-parameterization of conv nets: expand before training, collapse after it.

model = orepa_compiler.expand(model)       # every eligible conv becomes a block
...                                        # your own training loop
deploy = orepa_compiler.collapse(model)    # plain convs again, norms folded in
assert orepa_compiler.verify(model, deploy, inputs)
"""

from orepa_compiler.blocks import DEEP_STEM, OREPA, OREPA_1X1, Block
from orepa_compiler.compiler import collapse, expand, plan
from orepa_compiler.errors import (
    CheckpointError,
    ExportError,
    MissingPackage,
    NotLinear,
    ReparamError,
)
from orepa_compiler.layers import conv_operator
from orepa_compiler.operators import ConvOperator
from orepa_compiler.passes import COLLAPSE, EXPAND, Pipeline
from orepa_compiler.planning import Plan

__version__ = "0.1.0"

"""Re-parameterization of conv nets: expand before training, collapse after it.

    model = orepa_compiler.expand(model)       # every eligible conv becomes a block
    ...                                        # your own training loop
    deploy = orepa_compiler.collapse(model)    # plain convs again, norms folded in
    assert orepa_compiler.verify(model, deploy, inputs)
    orepa_compiler.export_onnx(deploy, inputs, "model.onnx")

`orepa_compiler.plan(model)` says first what would be done, and what not, and why.
"""

from orepa_compiler.blocks import DEEP_STEM as DEEP_STEM
from orepa_compiler.blocks import OREPA as OREPA
from orepa_compiler.blocks import OREPA_1X1 as OREPA_1X1
from orepa_compiler.blocks import Block as Block
from orepa_compiler.checkpoints import load as load
from orepa_compiler.checkpoints import save as save
from orepa_compiler.compiler import collapse as collapse
from orepa_compiler.compiler import expand as expand
from orepa_compiler.compiler import plan as plan
from orepa_compiler.errors import CheckpointError as CheckpointError
from orepa_compiler.errors import ExportError as ExportError
from orepa_compiler.errors import MissingPackage as MissingPackage
from orepa_compiler.errors import NotLinear as NotLinear
from orepa_compiler.errors import ReparamError as ReparamError
from orepa_compiler.export.onnx import export_onnx as export_onnx
from orepa_compiler.export.tensorrt import build_engine as build_engine
from orepa_compiler.layers import conv_operator as conv_operator
from orepa_compiler.operators import ConvOperator as ConvOperator
from orepa_compiler.passes import COLLAPSE as COLLAPSE
from orepa_compiler.passes import EXPAND as EXPAND
from orepa_compiler.passes import Pipeline as Pipeline
from orepa_compiler.planning import Plan as Plan
from orepa_compiler.planning import recorded_plans as recorded_plans
from orepa_compiler.reference import load_reference as load_reference
from orepa_compiler.stepping import kernels_once as kernels_once
from orepa_compiler.verification import verify as verify

__version__ = "0.1.0"

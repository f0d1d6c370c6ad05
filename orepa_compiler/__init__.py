"""Re-parameterization of conv nets: expand before training, collapse after it.

    model = orepa_compiler.expand(model)       # every eligible conv becomes a block
    ...                                        # your own training loop
    deploy = orepa_compiler.collapse(model)    # plain convs again, norms folded in
    assert orepa_compiler.verify(model, deploy, inputs)
    orepa_compiler.export_onnx(deploy, inputs, "model.onnx")

`orepa_compiler.plan(model)` says first what would be done, and what not, and why.
"""

from orepa_compiler.algebra.layers import conv_operator as conv_operator
from orepa_compiler.algebra.operators import ConvOperator as ConvOperator
from orepa_compiler.blocks import Block as Block
from orepa_compiler.blocks.catalogue import ACNET as ACNET
from orepa_compiler.blocks.catalogue import DBB as DBB
from orepa_compiler.blocks.catalogue import DEEP_STEM as DEEP_STEM
from orepa_compiler.blocks.catalogue import DILATED as DILATED
from orepa_compiler.blocks.catalogue import DO_CONV as DO_CONV
from orepa_compiler.blocks.catalogue import EXPAND_NET as EXPAND_NET
from orepa_compiler.blocks.catalogue import MOBILEONE as MOBILEONE
from orepa_compiler.blocks.catalogue import OREPA as OREPA
from orepa_compiler.blocks.catalogue import OREPA_1X1 as OREPA_1X1
from orepa_compiler.blocks.catalogue import OREPA_VGG as OREPA_VGG
from orepa_compiler.blocks.catalogue import REPVGG as REPVGG
from orepa_compiler.blocks.catalogue import mobileone as mobileone
from orepa_compiler.branches.field import DCTFilter as DCTFilter
from orepa_compiler.certifying import certify as certify
from orepa_compiler.checkpoints import load as load
from orepa_compiler.checkpoints import save as save
from orepa_compiler.compiler import collapse as collapse
from orepa_compiler.compiler import cut as cut
from orepa_compiler.compiler import drop_ranges as drop_ranges
from orepa_compiler.compiler import expand as expand
from orepa_compiler.compiler import fake_quantize as fake_quantize
from orepa_compiler.compiler import freeze_ranges as freeze_ranges
from orepa_compiler.compiler import plan as plan
from orepa_compiler.equalizing import equalize as equalize
from orepa_compiler.errors import CheckpointError as CheckpointError
from orepa_compiler.errors import ExportError as ExportError
from orepa_compiler.errors import Int8RangeWarning as Int8RangeWarning
from orepa_compiler.errors import MissingPackage as MissingPackage
from orepa_compiler.errors import NothingExpandedWarning as NothingExpandedWarning
from orepa_compiler.errors import NotLinear as NotLinear
from orepa_compiler.errors import NoVerdict as NoVerdict
from orepa_compiler.errors import ReparamError as ReparamError
from orepa_compiler.errors import TrainingFormWarning as TrainingFormWarning
from orepa_compiler.export.audit import audit_half as audit_half
from orepa_compiler.export.onnx import export_onnx as export_onnx
from orepa_compiler.export.runners import OnnxRunner as OnnxRunner
from orepa_compiler.export.runners import TensorRTRunner as TensorRTRunner
from orepa_compiler.export.tensorrt import build_engine as build_engine
from orepa_compiler.int8_analysis import int8_loss as int8_loss
from orepa_compiler.passes import COLLAPSE as COLLAPSE
from orepa_compiler.passes import EXPAND as EXPAND
from orepa_compiler.passes import Pipeline as Pipeline
from orepa_compiler.planning import Plan as Plan
from orepa_compiler.planning import recorded_plans as recorded_plans
from orepa_compiler.reference import load_reference as load_reference
from orepa_compiler.sides import verify as verify
from orepa_compiler.training.branch_history import BranchHistory as BranchHistory
from orepa_compiler.training.hooks import step_hooks as step_hooks
from orepa_compiler.training.optimizer_mapping import map_optimizer as map_optimizer
from orepa_compiler.training.parameter_groups import param_groups as param_groups
from orepa_compiler.training.stepping import kernels_once as kernels_once

__version__ = "0.1.0"

"""Collapsed models as ONNX files and TensorRT engines, and runners that compare them with torch."""

from orepa_compiler.export.audit import HalfAudit, audit_half
from orepa_compiler.export.gates.network import NetworkSummary, inspect_network
from orepa_compiler.export.latency import bench
from orepa_compiler.export.onnx.writing import export_onnx
from orepa_compiler.export.run.runners import OnnxRunner, TensorRTRunner
from orepa_compiler.export.run.signature import TensorSpec
from orepa_compiler.export.tensorrt.engine import build_engine

__all__ = [
    "HalfAudit",
    "NetworkSummary",
    "OnnxRunner",
    "TensorRTRunner",
    "TensorSpec",
    "audit_half",
    "bench",
    "build_engine",
    "export_onnx",
    "inspect_network",
]

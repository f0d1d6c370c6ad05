"""Lists what a command line offers to choose from; read before torch is imported."""

from __future__ import annotations

from typing import Literal

# How a model is named by a string.
FORMS = "torchvision:NAME, timm:NAME, package.module:factory or path/to/file.py:factory"

# The types of an exported file; int8 lies between two nodes of a float32 graph.
Precision = Literal["fp32", "fp16", "bf16", "int8"]

# What int8 is for: engines of TensorRT, or onnxruntime and OpenVINO on CPUs.
Preset = Literal["tensorrt", "cpu"]

# Which TensorRT builds an engine: the one that needs the GPU, or the one that does not.
Flavor = Literal["auto", "trt", "rtx"]

# What a trainer's file may hold both of: the weights themselves, and their running average.
Weights = Literal["model", "ema"]

# The ending of OpenVINO's files.
OPENVINO = ".xml"

# The endings of engines.
ENGINES = (".engine", ".plan", ".trt")

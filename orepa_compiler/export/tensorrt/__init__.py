"""Builds TensorRT engines from ONNX files."""

"""Writes a collapsed model as an ONNX file, and reads and rewrites ONNX files."""

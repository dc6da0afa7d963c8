"""The ONNX model as protobuf: graph look-ups and edits, and the arithmetic of a single layer.

ModelProto in, ModelProto or plain data out.
Imports only errors, version and targets.
"""

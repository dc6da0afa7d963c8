"""Rewrites of ONNX models: ModelProto in, ModelProto out, one a module; no disk, no runtime."""

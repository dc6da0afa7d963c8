"""Rate-distortion optimised quantization of ONNX models."""

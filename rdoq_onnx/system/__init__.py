"""Everything outside the process: ONNX Runtime, OpenVINO, disk, threads, progress, GPU memory.

One module each; no other module imports what they wrap.
Imports from model, calibration and passes.
"""

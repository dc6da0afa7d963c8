"""The model as protobuf: look-ups and edits of its graph, and the numbers of one layer.

ModelProto in, ModelProto or plain data out.
Imports from errors, version and targets alone.
"""

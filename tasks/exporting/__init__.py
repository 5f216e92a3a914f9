"""A version as a file that other programs run: ONNX, or torch's own program, with the preprocessing inside.

Read-only to the model: of the log, only manifests and blobs are read.
"""

"""Arithmetic on chunks: combine, scale, cast. One module per kind of device, same signatures.

Belongs here: functions from tensors to tensors. Does not: anything that knows of ranks or bytes.
"""

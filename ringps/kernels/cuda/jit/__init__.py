"""The kernels themselves, in Triton's language. Importing a module of this package imports triton.

Belongs here: functions that Triton compiles. Does not: what chooses their arguments and checks tensors, which
is in the module of the same name one package up.
"""

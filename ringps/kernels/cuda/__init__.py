"""Arithmetic on a GPU's tensors, by Triton kernels: pack, fold, hash, quantise.

Belongs here: functions from tensors to tensors that only put work into the current stream. Each takes tensors
on the CPU too, and then does the same in torch, to the same bits. Does not: streams, events and memory
(`ringps.device`), and anything that knows of ranks. Nothing here waits, except `digest.digest` and
`digest.collect`, whose results are needed on the host.

The kernels are in `ringps.kernels.cuda.jit`, which alone imports triton; it is imported when the first one is
launched. Triton compiles a kernel on its first use and keeps it on disk. Sizes, weights and alignments are
ordinary arguments, so that new ones compile nothing.
"""

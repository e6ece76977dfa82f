"""Saving and moving training state.

Belongs here: training state as bytes (`tree`, `pieces`); how a process gets it from its peers
(`state_server`, `peer`); how it lies in a checkpoint directory (`manifest`, `contents`, `store`), how it gets
there (`saver`), and what people can do with it (`inspection`). Does not: what a model's or an optimizer's
state consists of, and how ranks talk to each other while they save and restore (`optim`); who joins when
(`membership`). Nothing is pickled; bytes from outside are checked before they are used.
"""

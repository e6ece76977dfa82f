"""Saving and moving training state.

Belongs here: training state as bytes (`tree`, `pieces`), and how a process gets it from its peers
(`state_server`, `peer`). Does not: what a model's or an optimizer's state consists of (`optim`), and
who joins when (`membership`). Nothing is pickled; bytes from outside are checked before they are used.
"""

"""Collectives among the processes of one host, without a socket in between.

Belongs here: the memory that they share, how they meet, and how they reduce. Does not: who they are
(`membership`), in which order calls are carried out and what happens when ranks disagree (`collectives`).
"""

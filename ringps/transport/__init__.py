"""Bytes from one rank to another, and proof of who is on the other end.

Belongs here: sockets that carry chunks, their authentication and their counters. Does not: what
the bytes mean for a collective (`collectives`), or who is a member (`membership`).
"""

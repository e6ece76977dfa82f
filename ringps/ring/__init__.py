"""PURE: who sits next to whom, which elements go where in which step, and what to do on an event.

Nothing here touches a tensor, a socket, a thread or a clock. The same code plans the in-memory
ring of the tests, real transports and the simulator.
"""

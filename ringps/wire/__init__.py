"""What goes over a wire, as bytes: the header of a data chunk, and the control messages.

Belongs here: formats, and the strict checks that turn bytes from outside into values that the
rest of ringps may trust. Does not: sockets (`transport`, `membership`), and what a message means
for the ring (`membership`). Every module here is pure; bytes that do not follow the protocol
raise `FrameError` and nothing else.
"""

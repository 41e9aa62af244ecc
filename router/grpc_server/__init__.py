"""A gRPC server on one event loop, made for many streams of small messages.

gRPC's own for asyncio makes a system call and a hop between threads for each message of each stream; here all that one
turn of the loop has to say to a connection leaves in one write. Handlers are written for gRPC's API and run on either.
"""

"""How requests become token ids: small ones here and now, large ones in processes of their own.

JSON, field checks and templates hold the interpreter, and tokenising takes memory, so that one large
request would stop every stream. `reader.py` decides where a request is read, `workers.py` keeps the
processes, `worker.py` is what runs in one (it imports neither gRPC nor HTTP), `frames.py` is what they say
to each other.
"""

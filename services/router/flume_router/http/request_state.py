"""Keys of a request's state, by which its connection and its application know of each other."""

EVENTS = "flume.events"
"""Set once the answer is a stream of server-sent events."""

"""Bytes and seconds: communication, compute, memory, hardware. Numbers in, numbers out; nothing here knows a graph."""

"""Measure several implementations of the same work in turns, compare their outputs, print a table.

Each implementation runs in a separate process (`worker`), which imports its libraries, builds its networks and warms up
before anything counts. Repetitions alternate (A B A B), so that a machine that slows down slows down all. Outputs are
compared first; what disagrees is not timed.
"""

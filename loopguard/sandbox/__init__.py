"""Where tool calls run: cells in containers, a pool of them, and what sweeps up after dead loops.

`base` holds the contract, `wire` the frames, `pool` the choice of a cell, `docker` the containers, `attest` the look at
what the engine really applied, `reaper` the sweep.
"""

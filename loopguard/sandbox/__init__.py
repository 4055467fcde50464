"""Where tool calls run: cells in containers, a pool of them, and what sweeps up after dead loops.

    base          the contract that every runtime keeps
    engine        the Docker engine; the one file that speaks to its client
    attest        did the engine really apply what was asked?
    wire          frames between controller and cell
    files         names of files that travel
    pool          a few clean cells, and a fair queue
    egress        the way out, where a policy has one; `http_request` is what it understands
    owner         whose container is this, and does its owner live?
    docker        cells in Docker containers, and the runtime made of them
    reaper        the sweep

The pool knows nothing of containers, and only `engine` knows the Docker client.
"""

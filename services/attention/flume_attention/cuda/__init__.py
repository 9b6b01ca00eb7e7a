"""An attention node's memory and its answers on a GPU.

    paging          which blocks hold a row's past, as tables that kernels read
    ops             the kernels an answer is made of
    device_pool     keys and values in device memory
    captured_steps  one graph per number of rows: waits for a query, attends, signals, layer after layer
    eager           the same for what no graph fits: chunks of prompts, sequences whose ranges do not join
    answers         the host's side of both, for one lane
    direct_steps    captured steps of a lane whose two devices meet in memory: no host between their layers
    direct_rows     what such a step attends to
    direct_answers  the host's side of it
    lane_region     that memory; `region_offer` makes it, and all of this, with the lane
    direct_round_trip    how long such a hop takes on this machine, for `flumectl doctor`
    session         a lane's state machine with such answers
    backend         all of it as what the engine makes memory and lanes of

A captured step reads queries where a lane receives them and writes partials where it sends them; between
replays only tables and lengths change. Nothing here but `ops.TritonAttention` needs triton, and nothing but
`flume_kernels.gpu.cuda_device` calls CUDA.
"""

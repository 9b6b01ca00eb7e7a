"""The decode step of a weight node on a GPU: captured once per size, replayed for every token.

    buckets        which captured size a batch runs in
    microbatches   how many parts a step is cut into, from measured times
    step_buffers   the memory a captured step works on
    shortlist_buffers  the part of it that tells tokens: what samplers ask of the logits, and the answers
    device_weights a model's parameters in device memory
    ops            the small operations between the projections, as Triton kernels
    hops           how a step asks and is answered: by messages, or in memory that both devices map
    direct_tables  where in that memory, step by step
    decode_step    one decode step in the order that sends queries first: what is captured
    captured_steps captured steps by size, counted
    driver         the host's side of a replay: flags on one hand, messages on the other
    lane_exchange  those messages over lanes
    direct_exchange    what is left of them where the devices meet
    forward        all of it as the engine's forward pass over a decode batch
    eager          the same for what no captured step takes: the model's own pass, on a device
    backend        both as what the engine computes steps with

A captured step knows no attention node: it leaves queries in memory, raises a flag, and waits at another for
partials. Which node is asked is the driver's business, so a change of route is no concern of the graph: also
where the device asks by itself, at addresses that it reads anew in every replay.
Nothing in this package but `ops.TritonOps` needs triton, and nothing but
`flume_kernels.gpu.cuda_device` calls CUDA.
"""

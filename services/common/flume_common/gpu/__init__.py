"""What this machine has for nodes on GPUs, without torch and without touching a device.

nvml         the cards and their driver
visible      the one that a process here would compute on
mps          whether processes can share a card at once
limits       memory that may be pinned, and shared between processes
round_trip   UCX's version and transports, and a hop between two processes, measured
findings     what all of it means: which hop nodes would take, what stands in the way of running on GPUs
"""

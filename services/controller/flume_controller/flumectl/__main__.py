"""`python -m flume_controller.flumectl`."""

from flume_controller.flumectl import main

main(prog_name="flumectl")

"""What this computer offers, and how a program starts, writes and ends.

Devices, precisions and ranks come in; what the rest of the program asks of the machine goes out.
Read `accelerator` first: it makes the Accelerator and says what the machine can do. `choice` holds
what was requested beside what is actual. `signals` and `processes` stop a run and keep its ranks
together. `fsdp_launch` reads what `accelerate launch --use_fsdp` says. `cli` turns errors into exit
codes, `console` prints, `files` writes whole files, `memory` measures.

May import: the configuration.
"""

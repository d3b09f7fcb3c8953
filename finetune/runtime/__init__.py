"""What this computer offers, and how a program starts, writes and ends.

Devices, precisions and ranks come in; what the rest of the program asks of the machine goes out.
Read `accelerator` first: it makes the Accelerator and says what the machine can do. `choice` holds
what was requested beside what is actual. `signals` and `processes` stop a run and keep its ranks
together. `launch` says what of a launcher's environment is refused and what all ranks must share, and
`fsdp_launch` reads what `accelerate launch --use_fsdp` says. `locks` keeps runs apart. `cli` turns errors
into exit codes, `console` prints, `files` writes whole files, `memory` measures. `system` alone asks for
what Linux, macOS and Windows do not share.

May import: the configuration.
"""

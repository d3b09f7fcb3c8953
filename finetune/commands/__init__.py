"""One module for each `python -m finetune` command: its arguments and the order of its steps.

The input is the command line. The output is an exit code and what the command writes. The function
`command` of a module takes the arguments. `finetune/__main__.py` lists the commands and imports the requested
one. Start with `report`, the shortest. Code that several commands use, or that is useful without a command
line, is in the other folders.

May import: every other folder. No command imports another.
"""

"""One module for each `python -m finetune` command: its arguments, and the order of its work.

The command line comes in; an exit code and what the command writes come out. The function `command`
of a module takes the arguments. `finetune/__main__.py` lists the commands and imports the one that
was asked for. Start with `report`, the shortest. What two commands need, or someone may want
without a command line, lies in another folder.

May import: every other folder. No command imports another.
"""

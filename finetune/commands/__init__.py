"""One module a command of `python -m finetune`; its function `command` takes the arguments."""

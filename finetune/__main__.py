"""`python -m finetune <command>`: what can be done with rows before a run, and with a run after it."""

import sys
from collections.abc import Sequence

from finetune.command import run_command

USAGE = """usage: python -m finetune <command> ...

  audit --config FILE    what would be trained on: roles, cut and dropped rows, duplicates, leaks
  plan --config FILE     predicted and measured memory and time, and the token budget that fits
  verify --config FILE   the fast paths against the plain ones, on your model and rows
  replay RUN             repeat the update whose loss or gradient was not finite

`python -m finetune <command> --help` tells more."""


def main(argv: Sequence[str]) -> int:
    # Imported when asked for: each brings seconds of libraries.
    match argv[:1]:
        case ["audit"]:
            from finetune.audit import audit_command

            return run_command(audit_command, argv[1:])
        case ["replay"]:
            from finetune.replay import replay_command

            return run_command(replay_command, argv[1:])
        case ["plan"]:
            from finetune.memory import plan_command

            return run_command(plan_command, argv[1:])
        case ["verify"]:
            from finetune.verify import verify_command

            return run_command(verify_command, argv[1:])
        case [] | ["-h" | "--help"]:
            print(USAGE)
            return 0
    print(f"error: {argv[0]} is no command; there are audit, plan, verify and replay", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

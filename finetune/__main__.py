"""`python -m finetune <command>`: the commands for rows before a run, and for a run after it."""

import sys
from collections.abc import Sequence
from importlib import import_module

from finetune.runtime.cli import check_settings, run_command, settings_among

BEFORE = {
    "audit": ("--config FILE", "what would be trained on: roles, cut and dropped rows, duplicates, leaks"),
    "plan": ("--config FILE", "predicted and measured memory and time, and the token budget that fits"),
    "verify": ("--config FILE", "the fast paths against their reference paths, on your model and rows"),
    "schema": ("FILE", "a JSON schema, with which an editor completes and checks the YAML files"),
    "sweep": ("--over KEY=A,B", "a run for each value of a key, and which has the lowest eval loss"),
}
AFTER = {
    "report": ("RUN", "a report on one page: curves, before and after, answers, settings"),
    "compare": ("RUN RUN ...", "runs side by side, and the difference of their losses on the same rows"),
    "chat": ("RUN", "chat with the trained model or its base; answers the lines of a pipe"),
    "serve": ("RUN", "the model and its base by OpenAI's interface, with a page to talk to both"),
    "generate": ("RUN --input ROWS", "answers to the rows of a file, in batches; resumes if killed"),
    "export": ("RUN --output DIR", "a GGUF file of the merged model, for llama.cpp and Ollama"),
    "push": ("RUN --repo OWNER/NAME", "upload the adapter and its card to the Hugging Face Hub"),
    "evaluate": ("RUN", "loss, accuracy and answers of base and tuned model, with intervals"),
    "merge": ("RUN --output DIR", "a model folder that needs no PEFT, compared with the trained model"),
    "replay": ("RUN", "repeat the update whose loss or gradient was not finite"),
}
COMMANDS = {**BEFORE, **AFTER}


def usage() -> str:
    def lines(commands: dict[str, tuple[str, str]]) -> list[str]:
        return [f"  {f'{name} {takes}':26} {what}" for name, (takes, what) in commands.items()]

    return "\n".join(
        [
            "usage: python -m finetune <command> ...",
            "",
            "Before a run, on its rows and model:",
            *lines(BEFORE),
            "",
            "After it:",
            *lines(AFTER),
            "",
            "`python -m finetune <command> --help` tells more.",
        ]
    )


def main(argv: Sequence[str]) -> int:
    match list(argv):
        case [] | ["-h" | "--help", *_]:
            print(usage())
            return 0
        case [name, *arguments] if name in COMMANDS:
            if COMMANDS[name][0] == "--config FILE":
                debug = ["--debug"] if "--debug" in arguments else []
                if code := check_settings([*settings_among(arguments), *debug]):
                    return code

            def command(argv: Sequence[str]) -> int | None:
                # Imported only when it runs: a command takes seconds to import, which Ctrl-C may end.
                result: int | None = import_module(f"finetune.commands.{name}").command(argv)
                return result

            return run_command(command, arguments)
    *others, last = COMMANDS
    print(
        f"error: {argv[0]} is not a command; the commands are {', '.join(others)} and {last}", file=sys.stderr
    )
    return 2


def run() -> int:
    """The console script `finetune`."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())

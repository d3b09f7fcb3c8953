"""`python -m finetune serve RUN`: the trained model and its base behind OpenAI's chat completions interface.

Only programs on this computer can connect. http://127.0.0.1:8000 shows a page to talk to both models.
"""

import socket
from collections.abc import Sequence
from contextlib import suppress

import uvicorn

from finetune.model.generate import multiply_dequantized
from finetune.run.adapter import load_trained, parse_trained, trained_parser
from finetune.run.answers import add_answer_options, check_answer_options, choose_system_prompt
from finetune.runtime.console import say
from finetune.serving.app import HOST, create_app
from finetune.serving.engine import Engine

SECONDS_TO_END = 2  # for answers under way, after Ctrl-C


def command(argv: Sequence[str]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        ValueError: invalid arguments, a run or a model that cannot be used, or a port that is in use.
    """
    parser = trained_parser(
        "serve",
        "[options]",
        "Serve the trained model as `tuned` and its base as `base`, by OpenAI's chat completions interface, "
        "to programs on this computer; and a page to talk to both.",
    )
    parser.add_argument("--port", type=int, default=8000, help="port of 127.0.0.1 (8000); 0 takes a free one")
    add_answer_options(parser, "requests", note="; a request may have its own")
    arguments, trained = parse_trained(parser, argv)
    check_answer_options(arguments, temperature=0)
    with _listen(arguments.port) as listener:
        model = load_trained(trained)
        multiply_dequantized(model.model, model.precision.actual)
        system_prompt = choose_system_prompt(arguments, trained)
        with Engine(model, arguments.batch_size) as engine:
            title = f"{(trained.run_dir or trained.adapter).resolve().name}, and its base"
            app = create_app(engine, model, system_prompt, arguments.max_new_tokens, title)
            config = uvicorn.Config(
                app, log_level="warning", lifespan="off", timeout_graceful_shutdown=SECONDS_TO_END
            )
            address = f"http://{HOST}:{listener.getsockname()[1]}"
            say(f"page         {address}")
            say(f"OpenAI       base_url {address}/v1, model tuned or base, any api_key; Ctrl-C ends")
            with suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listener])


def _listen(port: int) -> socket.socket:
    """A socket that only this computer can connect to.

    Raises:
        ValueError: the port is in use, or none.
    """
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--port {port} of {HOST} cannot be used ({error}); choose another, or 0 for a free one"
        ) from error

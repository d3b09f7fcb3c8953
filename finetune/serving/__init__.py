"""Answer requests over HTTP: the trained model and its base, behind OpenAI's chat completions interface.

Requests come in; answers go out, whole or piece by piece. Read `app` first (the addresses, and the page to
talk to both models), then `requests` (what a request may ask) and `responses` (the form of what is sent),
then `engine` (which answers the waiting requests together, as one batch).

May import: report, run, training, model, ops, data, runtime, the configuration.
"""

"""Conversations become token ids and labels, by the model's chat template.

Read `chat_template` (how a template is used) and `named_templates` (those in named/), `targets` (what the
model has to write; `written` checks what a template made of it) and `tokenize` (token ids and labels).
`anatomy` takes an example's tokens apart again. Of what a model writes, `tool_calls` reads the calls
back by the template's marks, and `answer_parts` tells its calls from what it says.

May import: data.conversations, runtime, the configuration.
"""

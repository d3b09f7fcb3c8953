"""Conversations become token ids and labels, by the model's chat template.

Read `chat_template` (how a template is used) and `named_templates` (those in named/), `targets` (what the
model has to write; `written` checks what a template made of it) and `tokenize` (token ids and labels).
`anatomy` takes an example's tokens apart again. `answer_parts` reads what a model writes: its tool calls,
and what it says before them.

May import: data.conversations, runtime, the configuration.
"""

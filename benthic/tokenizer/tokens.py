"""Names of the added tokens, as in the released DeepSeek-V3 and R1 tokenizers, and the chat template that uses them."""

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"

FIRST = (BOS, EOS, PAD)  # ids 0, 1, 2; "special" in the file: `decode(skip_special=True)` leaves them out
LAST = (FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, THINK, END_THINK)  # the end of the vocabulary; text keeps them

# For tools that render with Jinja. `chat.render` writes the same text, but lets no token be forged from a message.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{{- messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '<｜User｜>' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{%- set followed = messages[loop.index:] | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- set content = message['content'].split('</think>')[-1] if followed else message['content'] -%}"
    "{{- '<｜Assistant｜>' + content + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}"
)

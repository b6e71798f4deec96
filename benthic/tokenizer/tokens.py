"""Names of the added tokens, as in the released DeepSeek-V3, R1 and V3.1 tokenizers."""

import re

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
CALLS = "<｜tool▁calls▁begin｜>"
END_CALLS = "<｜tool▁calls▁end｜>"
CALL = "<｜tool▁call▁begin｜>"
END_CALL = "<｜tool▁call▁end｜>"
OUTPUTS = "<｜tool▁outputs▁begin｜>"
END_OUTPUTS = "<｜tool▁outputs▁end｜>"
OUTPUT = "<｜tool▁output▁begin｜>"
END_OUTPUT = "<｜tool▁output▁end｜>"
SEP = "<｜tool▁sep｜>"
SEARCH = "<｜search▁begin｜>"  # only the V3.1 tokenizer has it

FIM = (FIM_HOLE, FIM_BEGIN, FIM_END)
CHAT = (USER, ASSISTANT, THINK, END_THINK)
TOOLS = (CALLS, END_CALLS, CALL, END_CALL, OUTPUTS, END_OUTPUTS, OUTPUT, END_OUTPUT, SEP)

FIRST = (BOS, EOS, PAD)  # ids 0, 1, 2; "special" in the file: `decode(skip_special=True)` leaves them out
LAST = FIM + CHAT  # the end of the vocabulary; text keeps them

THINKING = re.compile(f"({re.escape(THINK)}|{re.escape(END_THINK)})")
MARKUP = re.compile(f"(<｜[^｜]*｜>|{re.escape(THINK)}|{re.escape(END_THINK)})")  # tokens in a template's own text

"""Text to ids and back: byte-level BPE as in DeepSeek-V3, chat rendering with loss masks, safe streaming."""

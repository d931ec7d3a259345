"""Models written as GGUF files: a folder's keys, its tokenizer, the layout of the file, and the command's work."""

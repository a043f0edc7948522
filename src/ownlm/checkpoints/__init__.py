"""Models and the files they are kept in: Hugging Face directories (`weights`), those of codes (`coded`), GGUF (`gguf/`), and what
sentence-transformers keeps beside them (`pooling`); read whole, lent to the kernels layer by layer (`unread`), or in shards of equal
work (`shards`)."""

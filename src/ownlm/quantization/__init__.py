"""Weights in few bits: what the codes stand for and the layers that hold them (`codes`; floats in eight bits, `fp8`), how codes are
chosen (`gptq`, and `calibrate` for whole models), and the blocks of GGUF as codes of ours (`recode`)."""

"""What a model learns beside its frozen weights: LoRA (`lora`), the files that PEFT keeps it in (`peft`), and fresh heads (`tuning`)."""

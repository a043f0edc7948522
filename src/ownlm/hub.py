"""placeholder"""

BESIDE = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")

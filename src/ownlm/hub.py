"""placeholder"""

BESIDE = ("config.json", "generation_config.json")

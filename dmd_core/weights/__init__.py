"""Files in and out: LoRAs, checkpoints, the recipe that travels with them, and the translation of their keys."""

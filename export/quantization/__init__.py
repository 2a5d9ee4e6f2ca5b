"""Lower precision: float16 and int8 files made from a verified float32 file."""

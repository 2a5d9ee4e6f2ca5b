"""Whether a written file computes what the untouched Keras model computes."""

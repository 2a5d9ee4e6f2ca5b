"""Serving of exported models over the Open Inference Protocol v2. Imports neither Keras nor TensorFlow."""

"""From a Keras model to an ONNX graph or a SavedModel folder, not yet verified."""

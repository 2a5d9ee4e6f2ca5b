"""Reading exported files: onnxruntime sessions, devices, prediction, benchmarks, inspection. No Keras, no TensorFlow."""

"""Models by name: where the zoo, growth and weights meet. Also loading model files, and replacing heads."""

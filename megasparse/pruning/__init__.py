"""Which weights of a trained model can go, and how do the others make up for it? Layer by layer, without training."""

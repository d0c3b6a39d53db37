"""How does a trained model fit into 8, 4 or 3 bits a weight? Block by block; its zeros stay zeros."""

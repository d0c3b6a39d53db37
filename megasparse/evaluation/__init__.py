"""What a trained model knows: perplexity of a text, last words, choices by likelihood, and an adapter for lm-eval."""

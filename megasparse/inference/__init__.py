"""Trained models at work: opening them, sampling text from them."""

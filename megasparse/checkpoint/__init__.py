"""Checkpoints as transactions: a folder with a manifest exists whole or not at all."""

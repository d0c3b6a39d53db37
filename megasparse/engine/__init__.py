"""The binding to DeepSpeed: optimizer, engine, and the pieces of training state that each ZeRO stage holds."""

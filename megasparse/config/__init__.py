"""Configuration: schema, loader, and the DeepSpeed dictionary that is derived from it."""

"""What every package may use: atomic files and folders, number formats, hardware names, dtypes, activations."""

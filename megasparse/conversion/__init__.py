"""Other forms of models and checkpoints: Hugging Face, nanoGPT, sparse and dense copies, inspection."""

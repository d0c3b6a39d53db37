"""Models of Hugging Face transformers: one table per architecture, read in both directions.

``architectures`` says which tensors and settings correspond, ``settings`` reads and writes ``config.json``,
``tensors`` carries weights over one at a time, ``importing`` and ``exporting`` make the folders.
"""

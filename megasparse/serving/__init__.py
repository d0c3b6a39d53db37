"""A model behind OpenAI's completions interface: one batch that requests join and leave between two tokens."""

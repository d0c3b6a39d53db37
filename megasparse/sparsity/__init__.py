"""Which weights are active, how many, and when that changes. The vocabulary is in the README beside this file."""

"""Studies: several recipes at equal cost, over several seeds, and what may be concluded from them."""

"""HTML pages about runs that have been made: the report of one, the comparison of several."""

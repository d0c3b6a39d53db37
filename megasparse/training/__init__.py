"""Training: the loop, what it measures, and what it shows.

``console`` is what rank 0 prints while a run goes on, ``report`` the page that a run leaves behind, ``units`` the
numbers of both in words.
"""

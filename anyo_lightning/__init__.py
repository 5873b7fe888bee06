"""LLMs as pure encoders, nearest-neighbour search as the recommender."""

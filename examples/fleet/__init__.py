"""Two replicas of an API, two workers, and what joins them."""

"""Two replicas of an API and two workers, joined by a fleet."""

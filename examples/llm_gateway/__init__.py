"""A gateway to language models that generates nothing for a client that is gone."""

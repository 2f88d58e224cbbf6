"""A shop whose service is worth watching, and its live view."""

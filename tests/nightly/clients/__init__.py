"""Client libraries, each with a pool of five connections that all requests share."""

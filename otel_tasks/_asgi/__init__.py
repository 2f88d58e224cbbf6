"""The parts of the middleware: the connection, the request, and the lifespan."""

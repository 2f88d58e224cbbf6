"""Three services that call one another over HTTP: see README.md."""

"""One HTML page about runs and evaluations: what it reads and checks, and its template."""

"""The study: the graph of runs (Snakefile) and the report that answers the question."""

"""What a person reads after a run: the evaluation table, the curves, the HTML page."""

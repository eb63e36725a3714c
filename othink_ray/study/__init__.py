"""Run the paper's experiments as a list of runs and report their tables, figures and claims."""

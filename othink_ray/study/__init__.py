"""The paper's experiments as a list of runs, and the tables made from them."""

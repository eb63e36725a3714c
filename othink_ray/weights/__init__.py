"""How a policy travels from the learner to the engines, and how the arrival is proven."""

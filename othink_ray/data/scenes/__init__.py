"""Generated tasks: counting shapes in a grid, and geometry figures drawn to scale."""

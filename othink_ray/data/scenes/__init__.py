"""Generated tasks: counting shapes in a grid, and geometry drawn to scale."""

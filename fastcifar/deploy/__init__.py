"""What is done with trained networks: programs for other runtimes, explanations, smaller networks."""

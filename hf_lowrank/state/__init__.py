"""What is kept of a parameter, and how it is encoded."""

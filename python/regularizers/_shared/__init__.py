"""What several families use: argument checks, scheduled quantities, random seeds."""

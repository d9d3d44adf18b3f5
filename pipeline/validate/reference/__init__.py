"""What transformers computes for a sequence, which the gates compare with. Runs no graph of ours."""
